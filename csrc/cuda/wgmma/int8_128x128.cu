#include "cuda/wgmma/int8_tile.cuh"

namespace pared::cuda::wgmma {

void int8_128x128(const Int8Product& a, int device, cudaStream_t stream) {
  run<128, 128, 2, true>(a, device, stream);
}

}  // namespace pared::cuda::wgmma
