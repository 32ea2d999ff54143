// What kernels call.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

#define CUDA_HOST_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cuda_host {

CUDA_HOST_UNSEEN inline Block& here() { return *current_block; }
CUDA_HOST_UNSEEN inline uint3 thread_index() { return current_thread->index; }
CUDA_HOST_UNSEEN inline unsigned lane_index() { return current_thread->rank % 32; }
inline uint3 block_index() { return here().index; }
inline dim3 block_size() { return here().shape.block; }
inline dim3 grid_size() { return here().shape.grid; }
inline void* dynamic_shared() { return here().shared(); }

template <class T> uint64_t bits_of(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "not a type of the warp functions");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

inline unsigned vote(Operation operation, const Site& site, unsigned mask, bool yes) {
  return unsigned(here().collective(operation, site, mask, yes));
}

template <class T> T shuffle(const Site& site, unsigned mask, T value, unsigned source, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    here().fail(cudaErrorLaunchFailure, "%s at %s:%d: width %d", site.what, site.file, site.line, width);
  const uint64_t bits = here().collective(Operation::shuffle, site, mask, bits_of(value), source);
  T result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// For the race detector, a fence makes what came before it visible to all later atomic operations. Atomic operations
// alone order nothing, as on the device.
inline char fence_token;
inline void fence() {
  release(fence_token);
  acquire(fence_token);
}

template <class T> struct Same {
  using type = T;
};
template <class T> using SameAs = typename Same<T>::type;  // does not take part in the deduction of T

template <class T, class Change> T atomic_update(T* address, Change change) {
  here().yield_if_random();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  acquire(fence_token);
  return before;
}

}  // namespace cuda_host

inline void __syncthreads(CUDA_HOST_HERE) { cuda_host::here().barrier({"__syncthreads", file, line}, false); }
inline int __syncthreads_or(int vote, CUDA_HOST_HERE) {
  return cuda_host::here().barrier({"__syncthreads_or", file, line}, vote).yes != 0;
}
inline int __syncthreads_and(int vote, CUDA_HOST_HERE) {
  const cuda_host::Votes votes = cuda_host::here().barrier({"__syncthreads_and", file, line}, vote);
  return votes.yes == votes.threads;
}
inline int __syncthreads_count(int vote, CUDA_HOST_HERE) {
  return int(cuda_host::here().barrier({"__syncthreads_count", file, line}, vote).yes);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_HERE) {
  cuda_host::vote(cuda_host::Operation::sync, {"__syncwarp", file, line}, mask, false);
}
inline unsigned __ballot_sync(unsigned mask, int vote, CUDA_HOST_HERE) {
  return cuda_host::vote(cuda_host::Operation::ballot, {"__ballot_sync", file, line}, mask, vote);
}
inline int __any_sync(unsigned mask, int vote, CUDA_HOST_HERE) {
  return int(cuda_host::vote(cuda_host::Operation::any, {"__any_sync", file, line}, mask, vote));
}
inline int __all_sync(unsigned mask, int vote, CUDA_HOST_HERE) {
  return int(cuda_host::vote(cuda_host::Operation::all, {"__all_sync", file, line}, mask, vote));
}
template <class T> unsigned __match_any_sync(unsigned mask, T value, CUDA_HOST_HERE) {
  const uint64_t bits = cuda_host::bits_of(value);
  return unsigned(
      cuda_host::here().collective(cuda_host::Operation::match, {"__match_any_sync", file, line}, mask, bits));
}
inline unsigned __activemask() { return cuda_host::here().live_lanes(); }

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_HERE) {
  const unsigned lane = cuda_host::lane_index(), within = unsigned(width) - 1;
  return cuda_host::shuffle({"__shfl_sync", file, line}, mask, value, (lane & ~within) | (unsigned(source) & within),
                            width);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_HOST_HERE) {
  const unsigned lane = cuda_host::lane_index(), within = unsigned(width) - 1;
  return cuda_host::shuffle({"__shfl_up_sync", file, line}, mask, value, (lane & within) >= by ? lane - by : lane,
                            width);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_HOST_HERE) {
  const unsigned lane = cuda_host::lane_index(), within = unsigned(width) - 1;
  return cuda_host::shuffle({"__shfl_down_sync", file, line}, mask, value,
                            by <= within - (lane & within) ? lane + by : lane, width);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, CUDA_HOST_HERE) {
  const unsigned lane = cuda_host::lane_index(), within = unsigned(width) - 1, source = (lane ^ unsigned(with)) & 31;
  return cuda_host::shuffle({"__shfl_xor_sync", file, line}, mask, value, source <= (lane | within) ? source : lane,
                            width);
}

template <class T> T atomicAdd(T* address, cuda_host::SameAs<T> value) {
  return cuda_host::atomic_update(address, [=](T before) { return T(before + value); });
}
template <class T> T atomicMax(T* address, cuda_host::SameAs<T> value) {
  return cuda_host::atomic_update(address, [=](T before) { return before < value ? value : before; });
}
template <class T> T atomicMin(T* address, cuda_host::SameAs<T> value) {
  return cuda_host::atomic_update(address, [=](T before) { return value < before ? value : before; });
}
template <class T> T atomicOr(T* address, cuda_host::SameAs<T> value) {
  return cuda_host::atomic_update(address, [=](T before) { return before | value; });
}
template <class T> T atomicAnd(T* address, cuda_host::SameAs<T> value) {
  return cuda_host::atomic_update(address, [=](T before) { return before & value; });
}
template <class T> T atomicExch(T* address, cuda_host::SameAs<T> value) {
  return cuda_host::atomic_update(address, [=](T) { return value; });
}
template <class T> T atomicCAS(T* address, cuda_host::SameAs<T> compare, cuda_host::SameAs<T> value) {
  const T before = cuda_host::atomic_update(address, [=](T now) { return now == compare ? value : now; });
  if (before != compare) cuda_host::here().yield();  // a thread that tries again must not do so for ever
  return before;
}

inline void __threadfence() { cuda_host::fence(); }
inline void __threadfence_block() { cuda_host::fence(); }
inline void __threadfence_system() { cuda_host::fence(); }
[[noreturn]] inline void __trap(CUDA_HOST_HERE) {
  cuda_host::here().fail(cudaErrorLaunchFailure, "__trap at %s:%d", file, line);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; bit++) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}

template <class T> T __ldg(const T* address) { return *address; }
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float rsqrtf(float x) { return 1.0f / ::sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / ::sqrt(x); }

template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}

#undef CUDA_HOST_HERE
