// pared._cuda_kernels: the CUDA part, a shared object of its own. Pointers, sizes and streams come as
// integers from python/pared/_cuda.py, which has checked the tensors they belong to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/cuda_register.h"
#include "core/check.h"
#include "cuda/device.h"
#include "cuda/mask_plan.h"
#include "cuda/self_check.h"
#include "cuda/threshold_mask.h"

#ifdef PARED_CUDA_EMULATED
#include "cuda/emulate/faults.h"
#endif

namespace py = pybind11;

namespace pared {
namespace {

DType parse_dtype(const std::string& name) {
  for (DType t : {DType::f32, DType::f16, DType::bf16})
    if (name == dtype_name(t)) return t;
  throw TypeError(str("x: expected dtype float32 or float16 or bfloat16, got ", name));
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
  m.def("fault_names", &cuda::emulate::fault_names);
  m.def("run_fault", &cuda::emulate::run_fault, py::arg("name"));
#endif
  register_cuda_block_sparse(m);
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
      "threshold_mask",
      [](uintptr_t x, const std::string& dtype, int64_t n, uintptr_t threshold, uintptr_t mask, int device,
         uintptr_t stream) {
        const DType type = parse_dtype(dtype);
        PARED_CHECK(n >= 0, "n: expected a non-negative size, got ", n);
        PARED_CHECK(x % dtype_size(type) == 0, "x: expected memory aligned to its element size");
        PARED_CHECK(n == 0 || (x && threshold && mask),
                    "x, threshold, mask: expected device memory, got null");
        py::gil_scoped_release unlocked;  // a launch waits when the stream's queue is full
        cuda::threshold_mask({reinterpret_cast<const void*>(x), type, n,
                              reinterpret_cast<const float*>(threshold), reinterpret_cast<uint8_t*>(mask)},
                             device, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("x"), py::arg("dtype"), py::arg("n"), py::arg("threshold"), py::arg("mask"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "plan_mask",
      [](uintptr_t x, uintptr_t mask, int64_t n, int item_bytes, int multiprocessors) {
        const cuda::MaskPlan p = cuda::plan_mask(x, mask, n, item_bytes, multiprocessors);
        return py::make_tuple(p.head, p.vectors, p.tail, p.wide_stores, p.blocks);
      },
      py::arg("x"), py::arg("mask"), py::arg("n"), py::arg("item_bytes"), py::arg("multiprocessors"),
      "Launch configuration (head, vectors, tail, wide_stores, blocks); for the tests, no device is "
      "touched.");
}

}  // namespace pared
