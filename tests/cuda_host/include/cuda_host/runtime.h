// Launches and the host's side of the CUDA runtime.
#pragma once
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <vector>

#include "block.h"

using cudaStream_t = struct CUstream_st*;

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

namespace cuda_host {

constexpr int kDevices = 2, kMultiprocessors = 4;
constexpr size_t kDefaultShared = 48 << 10, kLargestShared = 227 << 10, kLargestParameters = 4096;

// One launch at a time in the process: static shared memory exists once. Recursive, so that a launch from within a
// kernel gets to where it is refused.
inline std::recursive_mutex launch_mutex;
inline FiberPool fiber_pool;
inline std::map<const void*, size_t> shared_opt_in;  // kernel: cudaFuncAttributeMaxDynamicSharedMemorySize

inline thread_local int current_device = 0;
inline thread_local std::vector<int> device_calls;

// For tests: the current device of this thread, and the arguments of its cudaSetDevice calls since the last look.
extern "C" __attribute__((used, visibility("default"))) inline int cuda_host_current_device() {
  return current_device;
}
extern "C" __attribute__((used, visibility("default"))) inline int cuda_host_device_calls(int* calls, int capacity) {
  const int count = static_cast<int>(device_calls.size());
  for (int i = 0; i < count && i < capacity; i++) calls[i] = device_calls[i];
  device_calls.clear();
  return count;
}

inline void check(const LaunchShape& shape, size_t parameter_bytes, const void* kernel) {
  const dim3 &g = shape.grid, &b = shape.block;
  char text[200];
  const auto refuse_if = [&](bool wrong, const char* format, auto... values) {
    if (!wrong) return;
    std::snprintf(text, sizeof text, format, values...);
    throw Failure{cudaErrorInvalidConfiguration, std::string("invalid configuration: ") + text};
  };
  refuse_if(current_block, "a launch inside a kernel");
  refuse_if(!g.x || !g.y || !g.z || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535, "a grid of (%u,%u,%u) blocks", g.x,
            g.y, g.z);
  const uint64_t threads = uint64_t(b.x) * b.y * b.z;
  refuse_if(b.x > 1024 || b.y > 1024 || b.z > 64 || !threads || threads > 1024, "a block of (%u,%u,%u) threads", b.x,
            b.y, b.z);
  refuse_if(parameter_bytes > kLargestParameters, "%zu bytes of kernel parameters, at most %zu", parameter_bytes,
            kLargestParameters);
  const auto opted = shared_opt_in.find(kernel);
  const size_t allowed = opted == shared_opt_in.end() ? kDefaultShared : std::max(opted->second, kDefaultShared);
  refuse_if(shape.dynamic_shared > allowed, "%zu bytes of dynamic shared memory, at most %zu for this kernel",
            shape.dynamic_shared, allowed);
}

// Runs the blocks from `first` on that may be unordered for the race detector; returns how many.
inline uint64_t run_group(const LaunchShape& shape, const std::vector<uint64_t>& order, uint64_t first,
                          uint64_t blocks, Block::Kernel kernel, const void* arguments, Schedule& schedule) {
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  const uint64_t fitting = std::max(1u, std::min(kUnorderedBlocks, kUnorderedThreads / threads));
  const uint64_t count = std::min(blocks - first, fitting);
  static char tokens[2];
  std::vector<std::unique_ptr<Block>> group;  // all live until the end, so that no two share an address
  for (uint64_t i = 0; i < count; i++) {
    const uint64_t rank = order.empty() ? first + i : order[first + i];
    group.push_back(std::make_unique<Block>(shape, unflatten(rank, shape.grid), kernel, arguments, tokens));
  }
  Failure failure{cudaSuccess, ""};
  for (unsigned slot = 0; slot < count && failure.code == cudaSuccess; slot++)
    run_with_own_shared_memory(slot, [&] {
      try {
        group[slot]->run(schedule, fiber_pool);
      } catch (const Failure& caught) {
        failure = caught;
      }
    });
  acquire(tokens[1]);
  current_block = nullptr;
  if (failure.code != cudaSuccess) {
    fiber_pool.discard_all();
    throw failure;
  }
  fiber_pool.give_all_back();
  return count;
}

inline void run_grid(const LaunchShape& shape, Block::Kernel kernel, const void* arguments) {
  Schedule schedule;
  const uint64_t blocks = uint64_t(shape.grid.x) * shape.grid.y * shape.grid.z;
  std::vector<uint64_t> order;
  if (schedule.random) {
    order.resize(blocks);
    for (uint64_t i = 0; i < blocks; i++) order[i] = i;
    for (uint64_t i = 0; i + 1 < blocks; i++) std::swap(order[i], order[i + schedule.pick(blocks - i)]);
  }
  for (uint64_t done = 0; done < blocks;)
    done += run_group(shape, order, done, blocks, kernel, arguments, schedule);
}

template <class... Parameters> class Launcher {
 public:
  using Kernel = void (*)(Parameters...);
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "CUDA copies kernel parameters byte by byte");

  Launcher(const Site& site, Kernel kernel, const LaunchShape& shape) : site_(site), kernel_(kernel), shape_(shape) {}

  // A failure is remembered for cudaGetLastError. Callers are often extern "C", so nothing is thrown.
  void operator()(Parameters... parameters) const noexcept {
    const Call call{kernel_, {parameters...}};
    const std::lock_guard<std::recursive_mutex> lock(launch_mutex);
    try {
      check(shape_, parameter_bytes(), reinterpret_cast<const void*>(kernel_));
      run_grid(shape_, &run_thread, &call);
    } catch (const Failure& failure) {
      fail(failure.code, failure.text);
    } catch (const std::bad_alloc&) {
      fail(cudaErrorMemoryAllocation, "no memory for a launch");
    }
  }

 private:
  struct Call {
    Kernel kernel;
    std::tuple<Parameters...> parameters;
  };

  static void run_thread(const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    std::apply(c.kernel, c.parameters);
  }

  static constexpr size_t parameter_bytes() {
    size_t bytes = 0;
    ((bytes = (bytes + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) + sizeof(Parameters)), ...);
    return bytes;
  }

  void fail(cudaError_t code, const std::string& text) const {
    const std::string where = std::string(site_.file) + ":" + std::to_string(site_.line);
    remember(code, where + ": launch of " + site_.what + ": " + text);
  }

  Site site_;
  Kernel kernel_;
  LaunchShape shape_;
};

template <class... Parameters>
Launcher<Parameters...> launcher(const Site& site, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                 size_t dynamic_shared, cudaStream_t) {
  return {site, kernel, {grid, block, dynamic_shared}};
}

}  // namespace cuda_host

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = cuda_host::kDevices;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_host::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  cuda_host::device_calls.push_back(device);
  if (device < 0 || device >= cuda_host::kDevices)
    return cuda_host::remember(cudaErrorInvalidDevice, "invalid device ordinal " + std::to_string(device));
  cuda_host::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= cuda_host::kDevices)
    return cuda_host::remember(cudaErrorInvalidDevice, "invalid device ordinal " + std::to_string(device));
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_host::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_host::kLargestShared;
      return cudaSuccess;
  }
  return cuda_host::remember(cudaErrorInvalidValue, "a device attribute that the host harness does not have");
}

template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::recursive_mutex> lock(cuda_host::launch_mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      size_t(value) > cuda_host::kLargestShared)
    return cuda_host::remember(cudaErrorInvalidValue, "a kernel cannot have " + std::to_string(value) +
                                                          " bytes of dynamic shared memory");
  cuda_host::shared_opt_in[reinterpret_cast<const void*>(kernel)] = size_t(value);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
