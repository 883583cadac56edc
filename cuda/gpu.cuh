// With objective.h the only header a kernel file includes. nvcc: the GPU's own instructions (device.cuh). A host
// compiler: the emulator, on which every kernel runs in every test. Both sides offer the same names:
//
//   launch(kernel, grid, block, shared_bytes, stream, arguments...)      never <<<>>>
//   SHARED(T, name, [dims]), DYN_SHARED(T, name)                         never __shared__
//   __syncthreads __syncwarp __shfl*_sync __ballot_sync __any_sync __all_sync __match_any_sync,
//   atomicAdd atomicCAS
//   warp_sum warp_max quad_sum quad_max                                  all 32 lanes; the 4 lanes of an mma row
//   mma_m16n8k16 mma_tile ldmatrix_x4 ldmatrix_x4_trans                  bf16 tensor cores, fp32 sums
//   cp_async_16 cp_async_commit cp_async_wait<groups left>               global -> shared memory
//   to_float to_bf16 pack_bf16 fast_exp fast_exp2
//   gpu_allocate gpu_release gpu_upload gpu_download gpu_zero gpu_wait   what the host side of a room needs (runtime.h)
//
// Rules for a kernel file: no inline assembly, no CUDA call; blocks of 32 n threads, at most 1024; no thread leaves,
// and none diverges, before a barrier or a collective that others reach: predicate. Nobody assumes a warp in lockstep,
// spins on memory or waits for another block. Sums in a fixed order: results do not depend on who runs first.
#pragma once

#include "cuda/backend.h"
#ifdef __CUDACC__
#include "cuda/device.cuh"
#else
#include "cuda/emulator/emulator.h"
#endif
#include "cuda/helpers.cuh"
#include "src/shapes.h"
