# The sources of the CUDA part, once for the GPU build and for the emulated one. A kernel's tests find it here.
set(PARED_CUDA_SOURCES
  block_sparse.cu
  csr.cu
  decode.cu
  decode_pack.cu
  device.cc
  int8_product.cu
  int8_quantize.cu
  launch_number.cc
  self_check.cu
  select_blocks.cu
  select_count.cu
  select_groups.cu
  select_mask.cu
  select_threshold.cu
  tensor_map.cc)
list(TRANSFORM PARED_CUDA_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
# In one unit, as those of _core: pybind11's templates once instead of five times.
set(PARED_CUDA_BINDINGS
  cuda_block_sparse.cc
  cuda_csr.cc
  cuda_decode.cc
  cuda_int8.cc
  cuda_module.cc)
list(TRANSFORM PARED_CUDA_BINDINGS PREPEND ${CMAKE_CURRENT_LIST_DIR}/../bindings/)
set_source_files_properties(${PARED_CUDA_BINDINGS} PROPERTIES UNITY_GROUP bindings)
# Kernels for sm_90a alone.
set(PARED_CUDA_SM90A_SOURCES
  wgmma/block_sparse.cu)
list(TRANSFORM PARED_CUDA_SM90A_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
# Those that need CUTLASS besides, which the emulator does not have.
set(PARED_CUTLASS_SOURCES
  wgmma/int8_128x128.cu
  wgmma/int8_128x256.cu
  wgmma/int8_64x128.cu)
list(TRANSFORM PARED_CUTLASS_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
