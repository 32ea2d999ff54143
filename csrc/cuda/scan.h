// What the forward and the backward scan have in common: parameters, tables, the place of a compressed value.
#pragma once
#include <cmath>

#include "../neurons/visit.h"
#include "../surrogates.h"
#include "sites.h"

#ifndef __CUDACC__
#define __grid_constant__
#endif

namespace snn {
namespace cuda {

constexpr int kAhead = 4;  // steps whose loads are under way at once

template <class N> __device__ typename N::Parameters parameters_of(const SnnLayer& layer, const SiteIndex& site) {
  using T = typename N::T;
  T values[N::Count];
#pragma unroll
  for (int p = 0; p < N::Count; p++) {
    const SnnParameter& q = layer.parameters[p];
    const int64_t offset = site.exists ? site.row * q.row_stride + site.col * q.col_stride : 0;
    values[p] = static_cast<const T*>(q.data)[offset];
  }
  return typename N::Parameters(values, layer.reset);
}

// Entry of a table in host memory, where both may be missing.
template <class P> P entry(P const* table, int64_t step) { return table ? table[step] : nullptr; }

template <class T> __device__ __forceinline__ T load(const void* from, int64_t offset) {
  return static_cast<const T*>(from)[offset];
}

// How many of the active sites of this block come before this thread.
__device__ __forceinline__ int rank_in_block(const uint64_t* active, const SiteIndex& site) {
  const int word = threadIdx.x / 64;
  const uint64_t* words = active + (site.unit - word);
  int rank = count_bits(words[word] & ((uint64_t(1) << (threadIdx.x % 64)) - 1));
  for (int before = 0; before < word; before++) rank += count_bits(words[before]);
  return rank;
}

}  // namespace cuda
}  // namespace snn
