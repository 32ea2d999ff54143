// Input gradient at the active sites: the product of a gradient row with a weight column for each of them. A block
// keeps some rows of a column tile of the gradients in shared memory; a warp keeps the weights of one input in
// registers and goes through the active rows, kEvents at a time. Tile after tile is added in order by the same warp.
#include "../raster.h"
#include "columns.h"
#include "kernels.h"

namespace snn {
namespace cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kInputsAtOnce = kWarp / kStageWords;  // a lane loads one raster word of them
constexpr int kInputs = 256;                        // of one block
constexpr int kEvents = 4;

// The sums over the warp of four values a lane, in half the shuffles of four separate sums: lane l returns the sum of
// value number l / 8.
template <class T> __device__ T sum_four(const T* value) {
  const int lane = threadIdx.x % kWarp;
  const bool upper = lane & 16, odd = lane & 8;
  const T a = (upper ? value[2] : value[0]) + __shfl_xor_sync(kFull, upper ? value[0] : value[2], 16);
  const T b = (upper ? value[3] : value[1]) + __shfl_xor_sync(kFull, upper ? value[1] : value[3], 16);
  T sum = (odd ? b : a) + __shfl_xor_sync(kFull, odd ? a : b, 8);
  sum += __shfl_xor_sync(kFull, sum, 4);
  sum += __shfl_xor_sync(kFull, sum, 2);
  return sum + __shfl_xor_sync(kFull, sum, 1);
}

template <class C> class InputGradient {
  using T = typename C::T;

 public:
  __device__ InputGradient(const SnnInputGradient& a, T* tile)
      : a_(a), tile_(tile), lane_(threadIdx.x % kWarp), words_(words_of(a.rows)), stage_(blockIdx.x) {}

  __device__ void run() {
    const int warp = threadIdx.x / kWarp;
    const int64_t begin = int64_t(blockIdx.y) * kInputs;
    const int64_t end = begin + kInputs < a_.inputs ? begin + kInputs : a_.inputs;
    for (int64_t first_column = 0; first_column < a_.outputs; first_column += C::kTileColumns) {
      __syncthreads();  // the tile before is still in use
      stage<C>(static_cast<const T*>(a_.grad), a_.rows, a_.outputs, stage_ * kRowsPerStage, first_column, tile_);
      __syncthreads();
      for (int64_t first = begin + warp * kInputsAtOnce; first < end; first += kWarps * kInputsAtOnce)
        some_inputs(first, end, first_column);
    }
  }

 private:
  __device__ void some_inputs(int64_t first, int64_t end, int64_t first_column) const {
    const int64_t input = first + lane_ / kStageWords, word = stage_ * kStageWords + lane_ % kStageWords;
    const unsigned long long loaded = input < end && word < words_ ? a_.transposed[input * words_ + word] : 0;
    for (unsigned any = __ballot_sync(kFull, loaded != 0); any;) {
      const int i = lowest_bit(any) / kStageWords;
      any &= ~(((1u << kStageWords) - 1) << (i * kStageWords));
      uint64_t bits[kStageWords];
#pragma unroll
      for (int w = 0; w < kStageWords; w++) bits[w] = __shfl_sync(kFull, loaded, i * kStageWords + w);
      one_input(first + i, first_column, bits);
    }
  }

  __device__ void one_input(int64_t input, int64_t first_column, const uint64_t* bits) const {
    T weight[C::V];
#pragma unroll
    for (int v = 0; v < C::V; v++) {
      const int64_t o = first_column + v * kWarp + lane_;
      const bool exists = o < a_.outputs;
      weight[v] = exists ? load_weight(input, o) : T(0);
    }
#pragma unroll
    for (int w = 0; w < kStageWords; w++)
      for (uint64_t rest = bits[w]; rest;) {
        T part[kEvents];
        int mine = -1;  // the row whose sum this lane gets
#pragma unroll
        for (int e = 0; e < kEvents; e++) {
          part[e] = T(0);
          if (!rest) continue;
          const int row = w * 64 + lowest_bit(rest);
          rest &= rest - 1;
          if (lane_ == e * (kWarp / kEvents)) mine = row;
#pragma unroll
          for (int v = 0; v < C::V; v++) part[e] += weight[v] * tile_[row * C::kTileColumns + v * kWarp + lane_];
        }
        const T sum = sum_four(part);
        if (mine < 0) continue;
        T* to = static_cast<T*>(a_.grad_active) + (stage_ * kRowsPerStage + mine) * a_.inputs + input;
        *to = first_column ? *to + sum : sum;
      }
  }

  __device__ T load_weight(int64_t input, int64_t o) const {
    return static_cast<const T*>(a_.tiles)[(o / kTile * a_.inputs + input) * kTile + o % kTile];
  }

  const SnnInputGradient& a_;
  T* const tile_;
  const int lane_;
  const int64_t words_, stage_;
};

template <class C> __global__ void __launch_bounds__(kThreads) input_gradient_kernel(SnnInputGradient a) {
  SNN_DYNAMIC_SHARED(typename C::T, tile);
  InputGradient<C>(a, tile).run();
}

}  // namespace

cudaError_t input_gradient(const SnnInputGradient& a, cudaStream_t stream) {
  return visit_columns(a.dtype, a.outputs, [&](auto tag) {
    using C = decltype(tag);
    return launch(input_gradient_kernel<C>, divide_up(a.rows, kRowsPerStage), divide_up(a.inputs, kInputs), kThreads,
                  stage_bytes<C>(), stream, a);
  });
}

}  // namespace cuda
}  // namespace snn
