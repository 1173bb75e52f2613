// pared._cuda_kernels: the CUDA part, a shared object of its own. Pointers, sizes and streams come as
// integers from python/pared/_cuda.py, which has checked the tensors they belong to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/cuda_register.h"
#include "bindings/names.h"
#include "core/check.h"
#include "cuda/device.h"
#include "cuda/select.h"
#include "cuda/self_check.h"

#ifdef PARED_CUDA_EMULATED
#include "cuda/emulate/banks.h"
#include "cuda/emulate/faults.h"
#endif

namespace py = pybind11;

namespace pared {
namespace {

SelectKey parse_key(const std::string& name) {
  if (name == "abs") return SelectKey::abs;
  if (name == "identity") return SelectKey::identity;
  if (name == "square") return SelectKey::square;
  if (name == "abs_mul") return SelectKey::product;
  throw ValueError(str("key: expected one of abs, identity, square, abs_mul, got '", name, "'"));
}

// w, n, dtype, key, g, period, g_dtype, mask: as cuda::SelectMember.
using MemberTuple =
    std::tuple<uintptr_t, int64_t, std::string, std::string, uintptr_t, int64_t, std::string, uintptr_t>;

cuda::SelectMember member(const MemberTuple& t) {
  const auto& [w, n, dtype, key, g, period, g_dtype, mask] = t;
  const cuda::SelectMember m = {
      reinterpret_cast<const void*>(w), n,      parse_float_dtype(dtype),   parse_key(key),
      reinterpret_cast<const void*>(g), period, parse_float_dtype(g_dtype), reinterpret_cast<uint8_t*>(mask)};
  PARED_CHECK(n >= 0 && period >= 0, "members: expected non-negative sizes, got ", n, " and ", period);
  PARED_CHECK(w % dtype_size(m.dtype) == 0, "members: expected memory aligned to its element size");
  PARED_CHECK(n == 0 || (w && (g || m.key != SelectKey::product)),
              "members: expected device memory, got null");
  return m;
}

// w, rows, cols, stride, dtype, key, g, g_stride, g_dtype: as cuda::SelectMatrix.
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, std::string, std::string, uintptr_t,
                               int64_t, std::string>;

cuda::SelectMatrix matrix(const MatrixTuple& t, int64_t taps) {
  const auto& [w, rows, cols, stride, dtype, key, g, g_stride, g_dtype] = t;
  const cuda::SelectMatrix m = {reinterpret_cast<const void*>(w),
                                rows,
                                cols,
                                stride,
                                parse_float_dtype(dtype),
                                parse_key(key),
                                reinterpret_cast<const void*>(g),
                                g_stride,
                                parse_float_dtype(g_dtype)};
  PARED_CHECK(rows >= 0 && cols >= 0 && cols < (int64_t{1} << 31),
              "x: expected rows of less than 2**31, got ", cols);
  PARED_CHECK(taps >= 1 && cols % taps == 0, "taps: expected a divisor of ", cols, ", got ", taps);
  PARED_CHECK(rows * cols == 0 || (w && (g || m.key != SelectKey::product)),
              "x: expected device memory, got null");
  return m;
}

// rows, channels, taps: as cuda::SelectBlocks.
using BlockTuple = std::tuple<int64_t, int64_t, int64_t>;

cuda::SelectBlocks blocks(const BlockTuple& t) {
  const auto [r, c, taps] = t;
  PARED_CHECK(r >= 1 && c >= 1 && taps >= 1, "block: expected positive sizes, got ", r, ", ", c, " and ",
              taps);
  return {r, c, taps};
}

cuda::SelectPlan plan(const std::vector<int64_t>& sizes, int64_t k, int multiprocessors) {
  int64_t elements = 0, tiles = 0;
  for (int64_t n : sizes) {
    elements += n;
    tiles += (n + cuda::kSelectTile - 1) / cuda::kSelectTile;
  }
  PARED_CHECK(k >= 1 && k <= elements, "k: expected 1 to ", elements, ", got ", k);
  return cuda::plan_select(static_cast<int64_t>(sizes.size()), elements, tiles, k, multiprocessors);
}

cuda::SelectPlan plan(const std::vector<int64_t>& sizes, int64_t k, int device, uintptr_t workspace,
                      int64_t bytes) {
  const cuda::SelectPlan p = plan(sizes, k, cuda::multiprocessors(device));
  PARED_CHECK(workspace && workspace % 256 == 0 && bytes >= p.bytes, "workspace: expected ", p.bytes,
              " aligned bytes, got ", bytes);
  return p;
}

}  // namespace

PYBIND11_MODULE(PARED_CUDA_MODULE, m, py::mod_gil_not_used()) {
  m.doc() = "pared's CUDA kernels";
  m.attr("ARCHITECTURES") = PARED_CUDA_ARCHITECTURES;
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });

#ifdef PARED_CUDA_EMULATED
  m.def("set_order", &cuda::emulate::set_order, py::arg("seed"));
  m.def("take_launched", &cuda::emulate::take_launched);
#ifdef __SANITIZE_ADDRESS__
  m.attr("SANITIZED") = true;
#else
  m.attr("SANITIZED") = false;
#endif
#ifdef PARED_ACCESSES
  m.attr("ACCESSES") = true;
#else
  m.attr("ACCESSES") = false;
#endif
  m.def("record_banks", &cuda::emulate::record_banks, py::arg("on"));
  m.def(
      "take_banks",
      [] {
        py::list uses;
        for (const cuda::emulate::BankUse& u : cuda::emulate::take_banks())
          uses.append(py::make_tuple(u.kernel, u.what, u.where, u.offset, u.bytes, u.instructions, u.taken,
                                     u.least, u.worst));
        return uses;
      },
      "(kernel, what, where, offset, bytes, instructions, taken, least, worst): as emulate::BankUse.");
  m.def("fault_names", &cuda::emulate::fault_names);
  m.def("run_fault", &cuda::emulate::run_fault, py::arg("name"));
#endif
  register_cuda_block_sparse(m);
  register_cuda_csr(m);
  register_cuda_decode(m);
  register_cuda_int8(m);
  m.def("device_count", &cuda::device_count);
  m.def(
      "device_info",
      [](int device) {
        const cuda::DeviceInfo info = cuda::device_info(device);
        py::dict d;
        d["name"] = info.name;
        d["capability"] = py::make_tuple(info.major, info.minor);
        d["multiprocessors"] = info.multiprocessors;
        const cuda::DeviceGuard guard(device, "device_info");
        const cudaError_t image = cuda::kernel_image_status();
        d["supported"] = image == cudaSuccess;
        if (image != cudaErrorNoKernelImageForDevice) cuda::check(image, "device_info");
        return d;
      },
      py::arg("device"));
  m.def(
      "self_check",
      [](const std::string& name, uintptr_t a, uintptr_t b, uintptr_t c, int device, uintptr_t stream) {
        cuda::self_check(
            name,
            {reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), reinterpret_cast<void*>(c)},
            device, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("name"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("device"), py::arg("stream"));
  m.def(
      "select_workspace",
      [](const std::vector<int64_t>& sizes, int64_t k, int device) {
        return plan(sizes, k, cuda::multiprocessors(device)).bytes;
      },
      py::arg("sizes"), py::arg("k"), py::arg("device"), "Bytes of workspace that select() needs.");
  // One selection is up to three calls with the same sizes, k and workspace.
  m.def(
      "select_threshold",
      [](const std::vector<MemberTuple>& members, int64_t k, uintptr_t workspace, int64_t workspace_bytes,
         uintptr_t value, uintptr_t counts, int device, uintptr_t stream) {
        std::vector<cuda::SelectMember> list;
        std::vector<int64_t> sizes;
        for (const MemberTuple& t : members) sizes.push_back(list.emplace_back(member(t)).n);
        const cuda::SelectPlan p = plan(sizes, k, device, workspace, workspace_bytes);
        PARED_CHECK(value && counts, "value, counts: expected device memory, got null");
        py::gil_scoped_release unlocked;  // a launch waits when the stream's queue is full
        cuda::select_threshold(list, p, k, reinterpret_cast<void*>(workspace),
                               {reinterpret_cast<float*>(value), reinterpret_cast<int64_t*>(counts)}, device,
                               reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("members"), py::arg("k"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("value"),
      py::arg("counts"), py::arg("device"), py::arg("stream"),
      "members: (w, n, dtype, key, g, period, g_dtype, mask); counts: above, ties, equal, nans.");
  m.def(
      "select_mask",
      [](const std::vector<int64_t>& sizes, int64_t k, uintptr_t workspace, int64_t workspace_bytes,
         int device, uintptr_t stream) {
        const cuda::SelectPlan p = plan(sizes, k, device, workspace, workspace_bytes);
        py::gil_scoped_release unlocked;
        cuda::select_mask(p, reinterpret_cast<void*>(workspace), device,
                          reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("sizes"), py::arg("k"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"),
      py::arg("stream"), "Fills the masks of the members.");
  m.def(
      "select_compact",
      [](int64_t size, int64_t k, uintptr_t workspace, int64_t workspace_bytes, uintptr_t keys,
         uintptr_t indices, int device, uintptr_t stream) {
        const cuda::SelectPlan p = plan({size}, k, device, workspace, workspace_bytes);
        PARED_CHECK(keys && indices, "keys, indices: expected device memory, got null");
        py::gil_scoped_release unlocked;
        cuda::select_compact(p, reinterpret_cast<void*>(workspace), reinterpret_cast<int32_t*>(keys),
                             reinterpret_cast<int64_t*>(indices), device,
                             reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("size"), py::arg("k"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("keys"),
      py::arg("indices"), py::arg("device"), py::arg("stream"),
      "Keys (int32) and indices of what the mask of the one member selects, in order of the index.");
  m.def(
      "select_groups",
      [](const MatrixTuple& x, int64_t k, int64_t group, int64_t taps, uintptr_t mask, uintptr_t nans,
         int device, uintptr_t stream) {
        const cuda::SelectGroupsArgs a = {matrix(x, taps),
                                          k,
                                          group,
                                          taps,
                                          reinterpret_cast<uint8_t*>(mask),
                                          reinterpret_cast<int64_t*>(nans)};
        PARED_CHECK(group >= 1 && k >= 0 && k <= group, "k: expected 0 to ", group, ", got ", k);
        PARED_CHECK(a.x.rows * a.x.cols == 0 || mask, "mask: expected device memory, got null");
        py::gil_scoped_release unlocked;
        cuda::select_mask_groups(a, device, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("x"), py::arg("k"), py::arg("group"), py::arg("taps"), py::arg("mask"), py::arg("nans"),
      py::arg("device"), py::arg("stream"), "The k largest of every `group` channels at one tap.");
  m.def(
      "select_block_scores",
      [](const MatrixTuple& x, const BlockTuple& block, uintptr_t scores, int device, uintptr_t stream) {
        const cuda::SelectBlocks b = blocks(block);
        const cuda::SelectMatrix given = matrix(x, b.taps);
        PARED_CHECK(given.rows * given.cols == 0 || scores, "scores: expected device memory, got null");
        py::gil_scoped_release unlocked;
        cuda::select_block_scores(given, b, reinterpret_cast<float*>(scores), device,
                                  reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("x"), py::arg("block"), py::arg("scores"), py::arg("device"), py::arg("stream"));
  m.def(
      "select_expand_blocks",
      [](int64_t rows, int64_t cols, const BlockTuple& block, uintptr_t chosen, uintptr_t mask, int device,
         uintptr_t stream) {
        const cuda::SelectBlocks b = blocks(block);
        PARED_CHECK(rows * cols == 0 || (chosen && mask), "chosen, mask: expected device memory, got null");
        py::gil_scoped_release unlocked;
        cuda::select_expand_blocks(rows, cols, b, reinterpret_cast<const uint8_t*>(chosen),
                                   reinterpret_cast<uint8_t*>(mask), device,
                                   reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("rows"), py::arg("cols"), py::arg("block"), py::arg("chosen"), py::arg("mask"),
      py::arg("device"), py::arg("stream"));
  m.def(
      "plan_select",
      [](const std::vector<int64_t>& sizes, int64_t k, int multiprocessors) {
        const cuda::SelectPlan p = plan(sizes, k, multiprocessors);
        py::dict d;
        d["elements"] = p.elements;
        d["tiles"] = p.tiles;
        d["sample"] = p.sample;
        d["hi_rank"] = p.hi_rank;
        d["lo_rank"] = p.lo_rank;
        d["capacity"] = p.capacity;
        d["blocks"] = p.blocks;
        d["bytes"] = p.bytes;
        return d;
      },
      py::arg("sizes"), py::arg("k"), py::arg("multiprocessors"),
      "What the host decides; no device is touched.");
}

}  // namespace pared
