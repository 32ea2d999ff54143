// Currents from spikes: a warp sums the weight columns of the inputs that spike in one row, in their order.
#include "../raster.h"
#include "columns.h"
#include "kernels.h"

namespace snn {
namespace cuda {
namespace {

constexpr int kThreads = 256, kTransposeRows = 8;
constexpr int kEvents = 4;  // weight columns that are loaded at once

template <class T> __global__ void __launch_bounds__(kWarp* kTransposeRows) pack_kernel(SnnPackWeights a) {
  __shared__ T square[kWarp][kWarp + 1];  // one more column: a column of it lies in 32 different banks
  const int64_t input = int64_t(blockIdx.x) * kWarp, output = int64_t(blockIdx.y) * kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int k = warp; k < kWarp; k += kTransposeRows) {
    const bool exists = output + k < a.outputs && input + lane < a.inputs;
    square[k][lane] = exists ? static_cast<const T*>(a.weight)[(output + k) * a.inputs + input + lane] : T(0);
  }
  __syncthreads();
  for (int k = warp; k < kWarp; k += kTransposeRows) {
    const int64_t j = input + k, o = output + lane;
    if (j < a.inputs) static_cast<T*>(a.tiles)[(o / kTile * a.inputs + j) * kTile + o % kTile] = square[lane][k];
  }
}

template <class C, bool Weighted> __global__ void __launch_bounds__(kThreads) forward_kernel(SnnSynapseForward a) {
  using T = typename C::T;
  const int lane = threadIdx.x % kWarp;
  const int64_t tiles = (a.outputs + C::kTileColumns - 1) / C::kTileColumns;
  const int64_t index = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t row = index / tiles, first = index % tiles * C::kTileColumns;
  if (row >= a.rows) return;  // the whole warp
  const T* weights[C::V];
  T sum[C::V];
#pragma unroll
  for (int v = 0; v < C::V; v++) {
    const int64_t o = first + v * kWarp + lane;
    // The tiles are padded to kTile columns, so what lies behind the last output is there and is zero.
    const int64_t tile = o < (a.outputs + kTile - 1) / kTile * kTile ? o / kTile : 0;
    weights[v] = static_cast<const T*>(a.tiles) + tile * a.inputs * kTile + o % kTile;
    sum[v] = a.bias && o < a.outputs ? static_cast<const T*>(a.bias)[o] : T(0);
  }
  const int64_t words = words_of(a.inputs);
  const T* dense = static_cast<const T*>(a.inputs_dense) + row * a.inputs;
  for (int64_t w = 0; w < words; w++) {
    uint64_t bits = a.raster[row * words + w];
    while (bits) {
      T weight[kEvents][C::V], factor[kEvents];
#pragma unroll
      for (int e = 0; e < kEvents; e++) {
        const bool event = bits != 0;
        const int64_t j = event ? w * 64 + lowest_bit(bits) : 0;
        bits &= bits - 1;
        factor[e] = event ? (Weighted ? dense[j] : T(1)) : T(0);
#pragma unroll
        for (int v = 0; v < C::V; v++) weight[e][v] = event ? weights[v][j * kTile] : T(0);
      }
#pragma unroll
      for (int e = 0; e < kEvents; e++)
#pragma unroll
        for (int v = 0; v < C::V; v++) sum[v] += Weighted ? factor[e] * weight[e][v] : weight[e][v];
    }
  }
#pragma unroll
  for (int v = 0; v < C::V; v++) {
    const int64_t o = first + v * kWarp + lane;
    if (o < a.outputs) static_cast<T*>(a.current)[row * a.outputs + o] = sum[v];
  }
}

}  // namespace

cudaError_t pack_weights(const SnnPackWeights& a, cudaStream_t stream) {
  const int64_t padded = divide_up(a.outputs, kTile) * kTile;
  return launch(a.dtype == kFloat32 ? pack_kernel<float> : pack_kernel<double>, divide_up(a.inputs, kWarp),
                padded / kWarp, kWarp * kTransposeRows, 0, stream, a);
}

cudaError_t synapse_forward(const SnnSynapseForward& a, cudaStream_t stream) {
  return visit_columns(a.dtype, a.outputs, [&](auto tag) {
    using C = decltype(tag);
    const int64_t warps = a.rows * divide_up(a.outputs, C::kTileColumns);
    const auto kernel = a.inputs_dense ? forward_kernel<C, true> : forward_kernel<C, false>;
    return launch(kernel, divide_up(warps, kThreads / kWarp), 1, kThreads, 0, stream, a);
  });
}

}  // namespace cuda
}  // namespace snn
