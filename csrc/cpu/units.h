// What the neuron scans walk over: units of one raster word, their parameters, and tables of pointers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../abi.h"
#include "../raster.h"
#include "lanes.h"

namespace snn {
namespace SSB_ISA {

// 64 neurons (or the rest) of one batch row: one raster word. Walked by next(), as divisions would cost too much.
struct Unit {
  int64_t index, row, word, lanes, base;  // base: offset of the first site

  Unit(const SnnLayer& layer, int64_t index) : index(index), words_(words_of(layer.cols)), cols_(layer.cols) {
    row = index / words_;
    word = index % words_;
    locate();
  }
  void next() {
    index++;
    if (++word == words_) {
      word = 0;
      row++;
    }
    locate();
  }

 private:
  void locate() {
    lanes = lanes_of(cols_, word);
    base = row * cols_ + 64 * word;
  }
  int64_t words_, cols_;
};

// Parameter values of the 64 lanes of a unit; reloaded only when some parameter is not a scalar.
template <class N> struct ParameterLanes {
  using T = typename N::T;
  T lane[N::Count][64];
  bool scalar = true;

  explicit ParameterLanes(const SnnLayer& layer) {
    for (int p = 0; p < N::Count; p++) {
      if (layer.parameters[p].row_stride || layer.parameters[p].col_stride) scalar = false;
      std::fill(lane[p], lane[p] + 64, *static_cast<const T*>(layer.parameters[p].data));
    }
  }
  void load(const SnnLayer& layer, const Unit& unit) {
    if (scalar) return;
    for (int p = 0; p < N::Count; p++) {
      const SnnParameter& q = layer.parameters[p];
      const T* data = static_cast<const T*>(q.data) + unit.row * q.row_stride + 64 * unit.word * q.col_stride;
      for (int64_t k = 0; k < unit.lanes; k++) lane[p][k] = data[k * q.col_stride];
    }
  }
  SNN_HD typename N::Parameters at(int64_t k) const {
    T values[N::Count];
    for (int p = 0; p < N::Count; p++) values[p] = lane[p][k];
    return typename N::Parameters(values);
  }
};

template <class T> inline T* entry(void* const* table, int64_t step) {
  return table ? static_cast<T*>(table[step]) : nullptr;
}
template <class T> inline const T* entry(const void* const* table, int64_t step) {
  return table ? static_cast<const T*>(table[step]) : nullptr;
}
inline uint64_t* entry(uint64_t* const* table, int64_t step) { return table ? table[step] : nullptr; }
inline const uint64_t* entry(const uint64_t* const* table, int64_t step) { return table ? table[step] : nullptr; }

// Tells the compiler the common lane count, so that full units run without a remainder loop.
template <class Body> inline void with_lanes(int64_t lanes, Body body) {
  if (lanes == 64)
    body(std::integral_constant<int64_t, 64>());
  else
    body(lanes);
}

template <class T> inline uint64_t pack_lanes(const T* lane, int64_t lanes) {
  return nonzero_lanes(lane) & lane_mask(lanes);
}
// Few bits of a raster are set, so setting them one by one beats converting all.
template <class T> inline void unpack_lanes(uint64_t word, T* lane) {
  std::fill(lane, lane + 64, T(0));
  for_each_bit(word, [&](int k) { lane[k] = T(1); });
}
template <class T, class Count> inline void copy_lanes(const T* from, T* to, Count lanes) {
  for (int64_t k = 0; k < lanes; k++) to[k] = from[k];
}

}  // namespace SSB_ISA
}  // namespace snn
