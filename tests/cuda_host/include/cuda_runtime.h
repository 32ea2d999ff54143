// What `#include <cuda_runtime.h>` finds when the tests compile the CUDA sources with a C++ compiler: kernels then run
// on the CPU. A block's threads are fibers, its barriers and warp collectives are rendezvous between them, and blocks
// run one after another. A kernel that would hang or break the rules fails with a text that says where and why.
//
// SNN_CUDA_HOST_SEED=n in the environment makes the next launches run their blocks and threads in a random order.
// -fsanitize=address,undefined sees what kernels do to memory, -fsanitize=thread their missing barriers, fences and
// atomics, also between nearby blocks. Not seen: bank conflicts, uninitialised static shared memory, whether static and
// dynamic shared memory fit together. A kernel whose blocks wait for each other never ends.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#include "cuda_host/types.h"
#include "cuda_host/runtime.h"
#include "cuda_host/device.h"

#if CUDA_HOST_TSAN
#define __shared__ static thread_local  // blocks that are unordered run on different OS threads
#else
#define __shared__ static
#endif

#define SNN_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::cuda_host::launcher({#kernel, __FILE__, __LINE__}, kernel, grid, block, shared, stream)(__VA_ARGS__)
#define SNN_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::cuda_host::dynamic_shared())

#define threadIdx (::cuda_host::thread_index())
#define blockIdx (::cuda_host::block_index())
#define blockDim (::cuda_host::block_size())
#define gridDim (::cuda_host::grid_size())
#define warpSize 32
