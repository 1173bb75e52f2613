#include "cuda/wgmma/int8_tile.cuh"

namespace pared::cuda::wgmma {

void int8_64x128(const Int8Product& a, int device, cudaStream_t stream) {
  run<64, 128, 1, true>(a, device, stream);
}

}  // namespace pared::cuda::wgmma
