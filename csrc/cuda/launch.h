// Launches with their check. The tests compile these sources with a C++ compiler and a <cuda_runtime.h> of their own,
// which runs kernels on the CPU and defines the two macros that the language has no portable form for.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__
#define SNN_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define SNN_DYNAMIC_SHARED(T, name)                          \
  extern __shared__ __align__(16) unsigned char snn_shared[]; \
  T* name = reinterpret_cast<T*>(snn_shared)
#endif

namespace snn {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kFull = 0xffffffffu;
constexpr int64_t kMaxGrid = 2147483647, kMaxGridY = 65535;

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Whether a grid can be launched; an empty one need not be.
inline bool launchable(int64_t x, int64_t y = 1) { return x > 0 && x <= kMaxGrid && y > 0 && y <= kMaxGridY; }

// Runs `kernel<<<x, threads, shared, stream>>>(arguments...)` and returns what became of it.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t x, int64_t y, int threads, int64_t shared,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (x == 0 || y == 0) return cudaSuccess;
  if (!launchable(x, y)) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
  SNN_LAUNCH(kernel, grid, dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared), stream, arguments...);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace snn
