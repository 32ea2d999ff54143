// Packing, unpacking and transposing of rasters.
#include "kernels.h"
#include "sites.h"

namespace snn {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class T> __global__ void __launch_bounds__(kSitesPerBlock) pack_kernel(SnnRasterPack a) {
  __shared__ int of_warp[kWarpsPerBlock];
  const SiteIndex site(a.rows, a.cols);
  const bool set = site.exists && static_cast<const T*>(a.dense)[site.offset(a.row_stride)] != T(0);
  const unsigned bits = __ballot_sync(kFull, set);
  write_bits(a.words, site, bits);
  if (!a.report.counts) return;
  const int total = sum_of_warps(count_bits(bits), of_warp);
  if (threadIdx.x == 0) report(a.report, total);
}

template <class T> __global__ void __launch_bounds__(kSitesPerBlock) unpack_kernel(SnnRasterUnpack a) {
  const SiteIndex site(a.rows, a.cols);
  if (site.exists) static_cast<T*>(a.dense)[site.offset(a.cols)] = read_bit(a.words, site) ? T(1) : T(0);
}

// A warp transposes 64 rows of one word: the ballot over the rows of one column is half a word of the result.
__global__ void __launch_bounds__(kThreads) transpose_kernel(SnnRasterTranspose a) {
  const int64_t words = words_of(a.cols), out_words = words_of(a.rows);
  const int lane = threadIdx.x % kWarp;
  // Neighbouring warps take neighbouring rows, so that what they write lies side by side.
  const int64_t tile = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t word = tile / out_words, out_word = tile % out_words;
  if (word >= words) return;  // the whole warp
  const int64_t row = out_word * 64 + lane;
  const uint64_t lower = row < a.rows ? a.words[row * words + word] : 0;
  const uint64_t upper = row + kWarp < a.rows ? a.words[(row + kWarp) * words + word] : 0;
  uint64_t mine[2] = {0, 0};  // the result's rows `lane` and `lane + 32`
#pragma unroll
  for (int column = 0; column < 64; column++) {
    const uint64_t low = __ballot_sync(kFull, int(lower >> column & 1));
    const uint64_t high = __ballot_sync(kFull, int(upper >> column & 1));
    if (lane == column % kWarp) mine[column / kWarp] = low | high << kWarp;
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t column = word * 64 + half * kWarp + lane;
    if (column < a.cols) a.transposed[column * out_words + out_word] = mine[half];
  }
}

}  // namespace

cudaError_t raster_pack(const SnnRasterPack& a, cudaStream_t stream) {
  const int64_t blocks = blocks_of(a.rows, a.cols);
  SnnRasterPack b = a;
  if (!reportable(a.report, blocks)) b.report.slot = nullptr;
  const auto kernel = a.dtype == kFloat32 ? pack_kernel<float> : pack_kernel<double>;
  return launch(kernel, blocks, 1, kSitesPerBlock, 0, stream, b);
}

cudaError_t raster_unpack(const SnnRasterUnpack& a, cudaStream_t stream) {
  const auto kernel = a.dtype == kFloat32 ? unpack_kernel<float> : unpack_kernel<double>;
  return launch(kernel, blocks_of(a.rows, a.cols), 1, kSitesPerBlock, 0, stream, a);
}

cudaError_t raster_transpose(const SnnRasterTranspose& a, cudaStream_t stream) {
  const int64_t tiles = words_of(a.cols) * words_of(a.rows);
  return launch(transpose_kernel, divide_up(tiles, kThreads / kWarp), 1, kThreads, 0, stream, a);
}

}  // namespace cuda
}  // namespace snn
