// What the neuron scans walk over: units of one raster word, their parameters, and tables of pointers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../abi.h"
#include "../neurons/visit.h"
#include "../raster.h"
#include "pack.h"

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
  using P = typename N::T;
  using T = typename P::Scalar;
  alignas(64) T lane[N::Count][64];
  const int reset;
  bool scalar = true;

  explicit ParameterLanes(const SnnLayer& layer) : reset(layer.reset) {
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
  // Those of the pack that begins at lane k.
  SNN_HD typename N::Parameters at(int k) const {
    P values[N::Count];
    for (int p = 0; p < N::Count; p++) values[p] = P::load(lane[p] + k);
    return typename N::Parameters(values, reset);
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

// Calls visit(tag) with the neuron struct that the layer names, on packs.
template <class Visit> auto visit_packs(const SnnLayer& layer, Visit visit) {
  return layer.dtype == kFloat32 ? visit_neuron<Pack<float>>(layer, visit) : visit_neuron<Pack<double>>(layer, visit);
}

template <class T> inline void copy_lanes(const T* from, T* to, int64_t lanes) {
  if (from != to) std::copy_n(from, lanes, to);
}

}  // namespace SSB_ISA
}  // namespace snn
