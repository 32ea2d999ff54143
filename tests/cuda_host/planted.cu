// Kernels for the tests of the host harness: right ones, and the same with one error planted. The results of the right
// ones are known exactly.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <memory>

namespace {

constexpr unsigned kFull = 0xffffffffu;

// ---- Right kernels.

template <int kThreads> __global__ void __launch_bounds__(kThreads) block_sum(const int* x, int n, int* sum) {
  __shared__ int part[kThreads];
  int mine = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) mine += __ldg(x + i);
  part[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned half = kThreads / 2; half; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(sum, part[0]);
}

__global__ void row_sums(const float4* x, int quads, float* sums) {
  const int row = blockIdx.x * (blockDim.x / warpSize) + threadIdx.x / warpSize, lane = threadIdx.x % warpSize;
  float sum = 0;
  for (int i = lane; i < quads; i += warpSize) {
    const float4 v = x[row * quads + i];
    sum += v.x + v.y + v.z + v.w;
  }
  for (int by = 16; by; by /= 2) sum += __shfl_down_sync(kFull, sum, by);
  sum = __shfl_sync(kFull, sum, 0);
  if (lane == 5) sums[row] = sum;
}

__global__ void pack(const float* x, int n, uint32_t* words, int* count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned word = __ballot_sync(kFull, i < n && x[i] != 0);
  if (threadIdx.x % warpSize == 0 && i < n) {
    words[i / warpSize] = word;
    atomicAdd(count, __popc(word));
  }
}

__global__ void reverse(int* x, int n) {
  SNN_DYNAMIC_SHARED(int, copy);
  copy[threadIdx.x] = x[blockIdx.x * n + threadIdx.x];
  __syncthreads();
  x[blockIdx.x * n + threadIdx.x] = copy[n - 1 - threadIdx.x];
}

__global__ void early_exit(int* out, int threads) {
  if (threadIdx.x >= unsigned(threads)) return;
  const int other = __shfl_xor_sync(kFull, int(threadIdx.x), 1);
  __syncthreads();
  out[threadIdx.x] = other;
}

// The block whose ticket is the last one adds up what all blocks have written.
template <bool kFence> __global__ void last_block(int* parts, unsigned* ticket, int* total) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = int(blockIdx.x) + 1;
    if (kFence) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 1)
    for (unsigned b = 0; b < gridDim.x; b++) *total += parts[b];  // missing_fence
}

__global__ void half_warps(unsigned* out) {
  const bool low = threadIdx.x < 16;
  unsigned sum = threadIdx.x;
  for (int turn = 0; turn < (low ? 1 : 3); turn++)
    for (int with = 8; with; with /= 2) sum += __shfl_xor_sync(low ? 0x0000ffffu : 0xffff0000u, sum, with, 16);
  out[threadIdx.x] = sum;
}

__global__ void votes(int* wrong) {
  const int t = threadIdx.x, lane = t % 32;
  int right = __syncthreads_or(t == 3) && !__syncthreads_or(0) && __syncthreads_and(1) && !__syncthreads_and(t != 7);
  right &= __activemask() == kFull;  // before the last collective: later, lanes may have returned
  right &= __syncthreads_count(t % 3 == 0) == 22;  // of 64
  right &= __any_sync(kFull, lane == 9) && !__any_sync(kFull, 0) && __all_sync(kFull, 1) && !__all_sync(kFull, lane);
  right &= __match_any_sync(kFull, lane / 8) == 0xffu << (lane / 8 * 8);
  right &= __shfl_up_sync(kFull, t, 3, 8) == (lane % 8 < 3 ? t : t - 3);
  right &= __shfl_down_sync(kFull, 2.5 * t, 3, 8) == 2.5 * (lane % 8 < 5 ? t + 3 : t);
  right &= __shfl_sync(kFull, uint64_t(t) << 40, 2, 4) == uint64_t(t / 4 * 4 + 2) << 40;
  if (!right) atomicAdd(wrong, 1);
}

__global__ void spin_lock(int* lock, int* total) {
  while (atomicCAS(lock, 0, 1)) {
  }
  *total += 1;
  __threadfence();
  atomicExch(lock, 0);
}

__global__ void coordinates(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = int(block * 1000 + thread);
}

__global__ void many_bytes(int* out, int n) {
  SNN_DYNAMIC_SHARED(unsigned char, bytes);
  bytes[n - 1 - threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = bytes[n - 32 + threadIdx.x];
}

__global__ void undefined_shared(int* out) {
  SNN_DYNAMIC_SHARED(float, values);
  out[blockIdx.x * blockDim.x + threadIdx.x] = isnan(values[threadIdx.x]);
}

// ---- Kernels with an error.

__global__ void read_beyond(const int* x, int n, int* out) {
  const int i = threadIdx.x;
  if (i <= n) out[i % n] = x[i];  // read_beyond
}

__global__ void write_beyond(int* out) {
  out[threadIdx.x] = 1;  // write_beyond
}

__global__ void dynamic_beyond(int* out) {
  SNN_DYNAMIC_SHARED(int, copy);
  copy[threadIdx.x + 1] = 1;  // dynamic_beyond
  out[threadIdx.x] = 0;
}

template <int kThreads> __global__ void static_beyond(int* out) {
  __shared__ int shared[kThreads];
  int* copy = shared + 1;
  copy[threadIdx.x] = 1;  // static_beyond
  out[threadIdx.x] = 0;
}

__global__ void misaligned(const int* x, int2* out) {
  out[threadIdx.x] = *reinterpret_cast<const int2*>(x + 1);  // misaligned
}

__global__ void missing_syncthreads(int* out) {
  SNN_DYNAMIC_SHARED(int, copy);
  copy[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = copy[(threadIdx.x + 32) % 64];  // missing_syncthreads
}

// Only the second barrier of each turn is missing.
__global__ void missing_second_barrier(int* out) {
  SNN_DYNAMIC_SHARED(int, copy);
  int sum = 0;
  for (int turn = 0; turn < 8; turn++) {
    copy[threadIdx.x] = turn;  // missing_second_barrier
    __syncthreads();
    sum += copy[(threadIdx.x + 1) % 64];
  }
  out[threadIdx.x] = sum;
}

__global__ void missing_syncwarp(int* out) {
  SNN_DYNAMIC_SHARED(int, copy);
  copy[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = copy[threadIdx.x ^ 1];  // missing_syncwarp
}

__global__ void missing_atomic(int* total) {
  *total += 1;  // missing_atomic
}

__global__ void missing_atomic_between_blocks(int* total) {
  __syncthreads();
  if (threadIdx.x == 0) *total += 1;  // missing_atomic_between_blocks
}

__global__ void divergent(int* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
    out[threadIdx.x] = 0;
  } else {
    __syncthreads();
  }
}

__global__ void stuck(int* out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __shfl_down_sync(kFull, 1, 1);
  else
    __syncthreads();
}

__global__ void outside_mask(int* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }

__global__ void absent_source(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

__global__ void wrong_index(const int* x, int* out) { out[threadIdx.x] = x[threadIdx.x ^ 1]; }

__global__ void nothing(int*) {}

struct Large {
  char bytes[4092];
};
__global__ void large_parameters(Large, int) {}
__global__ void larger_parameters(Large, int*) {}

// ---- The cases: each runs one kernel and returns whether its result is right.

// Memory of exactly this size on the heap, so that what lies beyond it is known.
template <class T> struct Array {
  explicit Array(int n, T value = T()) : size(n), data(new T[n]) {
    for (int i = 0; i < n; i++) data[i] = value;
  }
  operator T*() const { return data.get(); }
  template <class Expected> bool holds(Expected expected) const {
    for (int i = 0; i < size; i++)
      if (data[i] != expected(i)) return false;
    return true;
  }
  int size;
  std::unique_ptr<T[]> data;
};

Array<int> numbers(int n) {
  Array<int> x(n);
  for (int i = 0; i < n; i++) x[i] = i;
  return x;
}

using Case = bool (*)();
struct Named {
  const char* name;
  Case run;
};

#define ON_64_THREADS(name, kernel, dynamic, expected)                     \
  {name, [] {                                                               \
     Array<int> out(64, -1);                                                \
     SNN_LAUNCH(kernel, 1, 64, dynamic, nullptr, out);                      \
     return out.holds([]([[maybe_unused]] int i) { return expected; });     \
   }}

const Named kCases[] = {
    {"block_sum", [] {
       const Array<int> x = numbers(1000);
       int sum = 0;
       SNN_LAUNCH((block_sum<128>), 3, 128, 0, nullptr, x, x.size, &sum);
       return sum == 499500;
     }},
    {"row_sums", [] {
       Array<float4> x(8 * 40, make_float4(1, 2, 3, 4));
       Array<float> sums(8);
       SNN_LAUNCH(row_sums, 4, 64, 0, nullptr, x, 40, sums);
       return sums.holds([](int) { return 400; });
     }},
    {"pack", [] {
       Array<float> x(100);
       for (int i = 0; i < 100; i += 5) x[i] = 1;
       Array<uint32_t> words(4);
       int count = 0;
       SNN_LAUNCH(pack, 2, 64, 0, nullptr, x, 100, words, &count);
       return count == 20 && words[0] == 0x42108421u && words[1] == 0x10842108u;
     }},
    {"reverse", [] {
       Array<int> x = numbers(300);
       SNN_LAUNCH(reverse, 3, 100, 100 * sizeof(int), nullptr, x, 100);
       return x.holds([](int i) { return i / 100 * 100 + 99 - i % 100; });
     }},
    {"early_exit", [] {
       Array<int> out(48, -1);
       SNN_LAUNCH(early_exit, 1, 48, 0, nullptr, out, 40);
       return out.holds([](int i) { return i < 40 ? i ^ 1 : -1; });
     }},
    {"last_block", [] {
       Array<int> parts(10);
       unsigned ticket = 0;
       int total = 0;
       SNN_LAUNCH(last_block<true>, 10, 64, 0, nullptr, parts, &ticket, &total);
       return total == 55;
     }},
    {"half_warps", [] {
       Array<unsigned> out(32);
       SNN_LAUNCH(half_warps, 1, 32, 0, nullptr, out);
       return out.holds([](int i) { return i < 16 ? 120u : 47u * 8 * 16 * 16; });
     }},
    {"votes", [] {
       int wrong = 0;
       SNN_LAUNCH(votes, 2, 64, 0, nullptr, &wrong);
       return wrong == 0;
     }},
    {"spin_lock", [] {
       int lock = 0, total = 0;
       SNN_LAUNCH(spin_lock, 2, 64, 0, nullptr, &lock, &total);
       return total == 128;
     }},
    {"coordinates", [] {
       Array<int> out(24 * 30);
       SNN_LAUNCH(coordinates, dim3(2, 3, 4), dim3(5, 3, 2), 0, nullptr, out);
       return out.holds([](int i) { return i / 30 * 1000 + i % 30; });
     }},
    {"many_bytes", [] {
       Array<int> out(32);
       cudaFuncSetAttribute(many_bytes, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000);
       SNN_LAUNCH(many_bytes, 1, 32, 100000, nullptr, out, 100000);
       return out.holds([](int) { return 1; });
     }},
    {"undefined_shared", [] {
       Array<int> out(64);
       SNN_LAUNCH(undefined_shared, 2, 32, 32 * sizeof(float), nullptr, out);
       return out.holds([](int) { return 1; });
     }},
    {"large_parameters", [] {
       SNN_LAUNCH(large_parameters, 1, 1, 0, nullptr, Large(), 0);
       return true;
     }},

    {"read_beyond", [] {
       Array<int> x(63), out(63);
       SNN_LAUNCH(read_beyond, 1, 64, 0, nullptr, x, 63, out);
       return true;
     }},
    {"write_beyond", [] {
       Array<int> out(63);
       SNN_LAUNCH(write_beyond, 1, 64, 0, nullptr, out);
       return true;
     }},
    ON_64_THREADS("dynamic_beyond", dynamic_beyond, 64 * sizeof(int), 0),
    ON_64_THREADS("static_beyond", static_beyond<64>, 0, 0),
    {"misaligned", [] {
       Array<int2> x(2), out(1);
       SNN_LAUNCH(misaligned, 1, 1, 0, nullptr, reinterpret_cast<int*>(x.data.get()), out);
       return true;
     }},
    ON_64_THREADS("missing_syncthreads", missing_syncthreads, 64 * sizeof(int), (i + 32) % 64),
    ON_64_THREADS("missing_second_barrier", missing_second_barrier, 64 * sizeof(int), 28),
    ON_64_THREADS("missing_syncwarp", missing_syncwarp, 64 * sizeof(int), i ^ 1),
    {"missing_atomic", [] {
       int total = 0;
       SNN_LAUNCH(missing_atomic, 1, 64, 0, nullptr, &total);
       return total == 64;
     }},
    {"missing_atomic_between_blocks", [] {
       int total = 0;
       SNN_LAUNCH(missing_atomic_between_blocks, 3, 64, 0, nullptr, &total);
       return total == 3;
     }},
    {"missing_fence", [] {
       Array<int> parts(10);
       unsigned ticket = 0;
       int total = 0;
       SNN_LAUNCH(last_block<false>, 10, 64, 0, nullptr, parts, &ticket, &total);
       return total == 55;
     }},
    ON_64_THREADS("divergent", divergent, 0, 0),
    ON_64_THREADS("stuck", stuck, 0, 0),
    ON_64_THREADS("outside_mask", outside_mask, 0, 0),
    ON_64_THREADS("absent_source", absent_source, 0, 0),
    {"wrong_index", [] {
       const Array<int> x = numbers(64);
       Array<int> out(64);
       SNN_LAUNCH(wrong_index, 1, 64, 0, nullptr, x, out);
       return out.holds([](int i) { return i; });
     }},
    {"much_shared", [] {
       SNN_LAUNCH(nothing, 1, 1, 49153, nullptr, nullptr);
       return true;
     }},
    {"too_much_shared", [] {
       return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 232449) == cudaSuccess;
     }},
    {"many_threads", [] {
       SNN_LAUNCH(nothing, 1, 1025, 0, nullptr, nullptr);
       return true;
     }},
    {"no_blocks", [] {
       SNN_LAUNCH(nothing, 0, 1, 0, nullptr, nullptr);
       return true;
     }},
    {"many_blocks", [] {
       SNN_LAUNCH(nothing, dim3(1, 65536), 1, 0, nullptr, nullptr);
       return true;
     }},
    {"larger_parameters", [] {
       SNN_LAUNCH(larger_parameters, 1, 1, 0, nullptr, Large(), nullptr);
       return true;
     }},
    {"no_device", [] { return cudaSetDevice(1) == cudaSuccess && cudaSetDevice(2) == cudaSuccess; }},
};

}  // namespace

// "right", "wrong", or the text of the error after "error <code>: ".
extern "C" __attribute__((visibility("default"))) const char* planted(const char* name) {
  static thread_local char answer[4000];
  for (const Named& c : kCases) {
    if (std::strcmp(c.name, name)) continue;
    const bool right = c.run();
    const cudaError_t error = cudaPeekAtLastError();
    if (error != cudaGetLastError() || cudaGetLastError() != cudaSuccess) return "the error is not reported once";
    if (error == cudaSuccess) return right ? "right" : "wrong";
    std::snprintf(answer, sizeof answer, "error %d: %s", error, cudaGetErrorString(error));
    return answer;
  }
  return "unknown";
}
