// What the kernels have in common that run one thread a site: 64 threads a raster word, so a warp is half a word.
#pragma once
#include "../abi.h"
#include "../raster.h"
#include "launch.h"

namespace snn {
namespace cuda {

constexpr int kWordsPerBlock = kSitesPerBlock / 64, kWarpsPerBlock = kSitesPerBlock / kWarp;

inline int64_t blocks_of(int64_t rows, int64_t cols) { return divide_up(rows * words_of(cols), kWordsPerBlock); }

// The site of this thread in a matrix [rows, cols]. Threads beyond the last column or row have none: they take part in
// ballots and barriers, and touch no memory.
struct SiteIndex {
  int64_t unit, units, row, col;  // unit: index of the raster word
  bool exists;

  __device__ SiteIndex(int64_t rows, int64_t cols) {
    const int64_t words = words_of(cols);
    units = rows * words;
    unit = int64_t(blockIdx.x) * kWordsPerBlock + threadIdx.x / 64;
    // A 64-bit division takes as long as a whole step.
    row = units <= 0xffffffff ? uint32_t(unit) / uint32_t(words) : unit / words;
    col = (unit - row * words) * 64 + threadIdx.x % 64;
    exists = unit < units && col < cols;
  }
  __device__ int64_t offset(int64_t stride) const { return row * stride + col; }
};

// Writes the raster half word of a warp; all its lanes call this.
__device__ __forceinline__ void write_bits(uint64_t* raster, const SiteIndex& site, unsigned bits) {
  if (threadIdx.x % kWarp == 0 && site.unit < site.units)
    reinterpret_cast<uint32_t*>(raster)[2 * site.unit + threadIdx.x / kWarp % 2] = bits;
}

__device__ __forceinline__ bool read_bit(const uint64_t* raster, const SiteIndex& site) {
  return site.exists && (raster[site.unit] >> (threadIdx.x % 64) & 1);
}

// The sum over the block, in its first thread.
__device__ __forceinline__ int sum_of_warps(int of_warp, int* shared) {
  __syncthreads();  // `shared` may still be read from a call before
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  int sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kWarpsPerBlock; warp++) sum += shared[warp];
  return sum;
}

constexpr int64_t kMaxReportingBlocks = 1 << (62 - kReportBits);

// Adds `second` to the report's second count; the last block of the grid sends both to the host. Called by the first
// thread of each block when all the block's counts are in. Counts are integers, so their order does not matter.
__device__ __forceinline__ void report(const SnnReport& to, int64_t second) {
  using Word = unsigned long long;
  Word* counts = reinterpret_cast<Word*>(to.counts);
  if (!to.slot) {
    atomicAdd(counts + 1, static_cast<Word>(second));
    return;
  }
  // The number of blocks that are done rides above the count itself, to save one more atomic operation.
  __threadfence();
  const Word block = Word(1) << kReportBits;
  const Word before = atomicAdd(counts + 1, static_cast<Word>(second) | block);
  if (before >> kReportBits != gridDim.x - 1) return;
  const Word done = atomicAdd(counts + 1, ~(block * gridDim.x) + 1) & (block - 1);
  volatile int64_t* slot = to.slot;
  slot[0] = to.tag << kReportBits | static_cast<int64_t>(atomicAdd(counts, Word(0)));
  slot[1] = to.tag << kReportBits | static_cast<int64_t>(done);
}

inline bool reportable(const SnnReport& report, int64_t blocks) {
  return !report.slot || blocks < kMaxReportingBlocks;
}

}  // namespace cuda
}  // namespace snn
