// Weight gradient: for each input, the sum of the gradient rows of the time steps and batch entries where it spikes.
// A block keeps some rows of a column tile of the gradients in shared memory and its sums in registers; rows are cut
// into parts that are summed apart and then added in order, so the result is the same in every run.
#include "../raster.h"
#include "columns.h"
#include "kernels.h"

namespace snn {
namespace cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kInputsPerWarp = kInputsPerBlock / kWarps;
static_assert(kInputsPerWarp * kStageWords <= kWarp, "a lane loads one raster word of the warp's inputs");

template <class C, bool Weighted> __global__ void __launch_bounds__(kThreads, 2) partial_kernel(SnnWeightGradient a) {
  using T = typename C::T;
  SNN_DYNAMIC_SHARED(T, tile);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles = (a.outputs + C::kTileColumns - 1) / C::kTileColumns;
  const int64_t first_column = blockIdx.x % tiles * C::kTileColumns;
  const int64_t first_input = blockIdx.x / tiles * kInputsPerBlock + warp * kInputsPerWarp;
  const int64_t words = words_of(a.rows), stages = (a.rows + kRowsPerStage - 1) / kRowsPerStage;
  const int64_t per_split = (stages + a.splits - 1) / a.splits, begin = blockIdx.y * per_split;
  const int64_t end = begin + per_split < stages ? begin + per_split : stages;
  T sum[kInputsPerWarp][C::V] = {};
  for (int64_t s = begin; s < end; s++) {
    __syncthreads();  // the stage before is still in use
    stage<C>(static_cast<const T*>(a.grad), a.rows, a.outputs, s * kRowsPerStage, first_column, tile);
    const int64_t input = first_input + lane / kStageWords, word = s * kStageWords + lane % kStageWords;
    const bool mine = lane < kInputsPerWarp * kStageWords && input < a.inputs && word < words;
    const unsigned long long loaded = mine ? a.transposed[input * words + word] : 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kInputsPerWarp; i++) {
#pragma unroll
      for (int w = 0; w < kStageWords; w++) {
        const uint64_t bits = __shfl_sync(kFull, loaded, i * kStageWords + w);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          // Halves of a word: single bits of 64 would cost twice the instructions.
          const int first_row = w * 64 + half * 32;
          for (unsigned rest = static_cast<unsigned>(bits >> (32 * half)); rest; rest &= rest - 1) {
            const int row = first_row + lowest_bit(rest);
            T factor = T(1);
            if (Weighted) {
              const int64_t at = (s * kRowsPerStage + row) * a.inputs + first_input + i;
              factor = static_cast<const T*>(a.inputs_dense)[at];
            }
#pragma unroll
            for (int v = 0; v < C::V; v++) {
              const T g = tile[row * C::kTileColumns + v * kWarp + lane];
              sum[i][v] += Weighted ? factor * g : g;
            }
          }
        }
      }
    }
  }
  T* partial = static_cast<T*>(a.partial) + blockIdx.y * a.inputs * a.outputs;
#pragma unroll
  for (int i = 0; i < kInputsPerWarp; i++)
#pragma unroll
    for (int v = 0; v < C::V; v++) {
      const int64_t input = first_input + i, o = first_column + v * kWarp + lane;
      if (input < a.inputs && o < a.outputs) partial[input * a.outputs + o] = sum[i][v];
    }
}

constexpr int kSquareRows = 8;

// Adds the parts in order and transposes: [splits, inputs, outputs] -> [outputs, inputs].
template <class T> __global__ void __launch_bounds__(kWarp* kSquareRows) reduce_kernel(SnnWeightGradient a) {
  __shared__ T square[kWarp][kWarp + 1];  // one more column: a column of it lies in 32 different banks
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t output = int64_t(blockIdx.x) * kWarp, input = int64_t(blockIdx.y) * kWarp;
  for (int k = warp; k < kWarp; k += kSquareRows) {
    T sum = T(0);
    if (input + k < a.inputs && output + lane < a.outputs)
      for (int64_t s = 0; s < a.splits; s++)
        sum += static_cast<const T*>(a.partial)[(s * a.inputs + input + k) * a.outputs + output + lane];
    square[k][lane] = sum;
  }
  __syncthreads();
  for (int k = warp; k < kWarp; k += kSquareRows)
    if (output + k < a.outputs && input + lane < a.inputs)
      static_cast<T*>(a.grad_weight)[(output + k) * a.inputs + input + lane] = square[lane][k];
}

}  // namespace

cudaError_t weight_gradient(const SnnWeightGradient& a, cudaStream_t stream) {
  cudaError_t error = visit_columns(a.dtype, a.outputs, [&](auto tag) {
    using C = decltype(tag);
    const int64_t blocks = divide_up(a.outputs, C::kTileColumns) * divide_up(a.inputs, kInputsPerBlock);
    const auto kernel = a.inputs_dense ? partial_kernel<C, true> : partial_kernel<C, false>;
    return launch(kernel, blocks, a.splits, kThreads, stage_bytes<C>(), stream, a);
  });
  if (error != cudaSuccess) return error;
  return launch(a.dtype == kFloat32 ? reduce_kernel<float> : reduce_kernel<double>, divide_up(a.outputs, kWarp),
                divide_up(a.inputs, kWarp), kWarp * kSquareRows, 0, stream, a);
}

}  // namespace cuda
}  // namespace snn
