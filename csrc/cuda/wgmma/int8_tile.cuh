// The int8 product by CUTLASS: TMA and wgmma, warp-specialised and persistent, for sm_90a alone. One .cu a
// tile includes this, because each instantiation takes nvcc half a minute.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/epilogue.h"
#include "cuda/int8_wgmma.h"

namespace pared::cuda::wgmma {

// The epilogue's steps as CUTLASS wants them: on arrays, inputs in the order of the visitor's children.

// sum + correction modulo 2^32.
template <class Array>
struct Correct {
  CUTLASS_DEVICE Array operator()(const Array& sum, const Array& correction) const {
    Array out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Array::kElements; ++i)
      out[i] = static_cast<int32_t>(static_cast<uint32_t>(sum[i]) + static_cast<uint32_t>(correction[i]));
    return out;
  }
};

// activation(sum x_scale w_scale + bias), each step rounded as in the mma.sync kernel's dequantize().
struct DequantizeArguments {
  Activation activation = Activation::none;
};
template <class Array>
struct Dequantize {
  using Arguments = DequantizeArguments;
  CUTLASS_DEVICE Array operator()(const Array& sum, const Array& x_scale, const Array& w_scale,
                                  const Array& bias, const Arguments& arguments) const {
    Array out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Array::kElements; ++i)
      out[i] = activate(__fadd_rn(__fmul_rn(__fmul_rn(sum[i], x_scale[i]), w_scale[i]), bias[i]),
                        arguments.activation);
    return out;
  }
};

// A tile of kRows tokens by kColumns outputs; kCluster tiles of tokens share the weights that they load.
template <int kRows, int kColumns, int kCluster, bool kPingpong, class Y>
struct Product {
  using Tile = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::_128>;
  using Cluster = cute::Shape<cute::Int<kCluster>, cute::_1, cute::_1>;
  using Mainloop = cute::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                       cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Store = cute::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                    cutlass::epilogue::TmaWarpSpecializedCooperative>;

  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  template <class T>
  using OfOutput = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, T>;
  using OfToken = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float>;
  using Sum = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Correct, int32_t, int32_t, kRound>,
      cutlass::epilogue::fusion::Sm90AccFetch, OfOutput<int32_t>>;
  using Epilogue =
      cutlass::epilogue::fusion::Sm90EVT<cutlass::epilogue::fusion::Sm90Compute<Dequantize, Y, float, kRound>,
                                         Sum, OfToken, OfOutput<float>, OfOutput<float>>;

  static constexpr int kYAlign = 16 / sizeof(Y);
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, cutlass::layout::RowMajor,
      kYAlign, Y, cutlass::layout::RowMajor, kYAlign, Store, Epilogue>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, kInt8Align,
      int8_t, cutlass::layout::ColumnMajor, kInt8Align, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop,
                                                      CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static void run(const Int8Product& a, int device, cudaStream_t stream, const char* name) {
    using cute::_1;
    const int m = static_cast<int>(a.tokens), n = static_cast<int>(a.outputs),
              // Rows are padded with zeros, so that any reduction is a multiple of 16.
        k = static_cast<int>(int8_padded(a.cols));
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {a.a, {a.a_stride, _1{}, int64_t{0}}, a.b, {a.b_stride, _1{}, int64_t{0}}},
        {{{{}, {a.correction, 0, {}}, {}},
          {a.x_scales, 0.0f, {}},
          {a.w_scales, 0.0f, {}},
          {a.bias, 0.0f, {}},
          {a.activation}},
         nullptr,
         {},
         static_cast<Y*>(a.y),
         {a.y_stride, _1{}, int64_t{0}}}};
    arguments.hw_info.device_id = device;
    arguments.hw_info.sm_count = multiprocessors(device);
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(arguments);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    check(cudaGetLastError(), name);
    if (status != cutlass::Status::kSuccess)
      throw std::runtime_error(std::string(name) + ": " + cutlass::cutlassGetStatusString(status));
    if (synchronous()) check(cudaStreamSynchronize(stream), name);
  }
};

template <int kRows, int kColumns, int kCluster, bool kPingpong>
void run(const Int8Product& a, int device, cudaStream_t stream) {
  switch (a.dtype) {
    case DType::f32:
      return Product<kRows, kColumns, kCluster, kPingpong, float>::run(a, device, stream, "int8_wgmma_f32");
    case DType::f16:
      return Product<kRows, kColumns, kCluster, kPingpong, cutlass::half_t>::run(a, device, stream,
                                                                                 "int8_wgmma_f16");
    default:
      return Product<kRows, kColumns, kCluster, kPingpong, cutlass::bfloat16_t>::run(a, device, stream,
                                                                                     "int8_wgmma_bf16");
  }
}

}  // namespace pared::cuda::wgmma
