#include "cuda/wgmma/int8_tile.cuh"

namespace pared::cuda::wgmma {

void int8_128x256(const Int8Product& a, int device, cudaStream_t stream) {
  run<128, 256, 2, false>(a, device, stream);
}

}  // namespace pared::cuda::wgmma
