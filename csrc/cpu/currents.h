// Sums of weight columns, row by row: the currents that the events of a raster cause.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../abi.h"
#include "../raster.h"
#include "lanes.h"
#include "parallel.h"

namespace snn {
namespace SSB_ISA {

template <class T> struct TileSum {
  Vector<T> v[kTileVectors<T>];
  SNN_HD void zero() {
    for (auto& x : v) x = Vector<T>{};
  }
  SNN_HD void set(const T* p) {
    for (int i = 0; i < kTileVectors<T>; i++) v[i] = load(p + i * kVectorLanes<T>);
  }
  SNN_HD void add(const T* p) {
    for (int i = 0; i < kTileVectors<T>; i++) v[i] += load(p + i * kVectorLanes<T>);
  }
  SNN_HD void add(const TileSum& other) {
    for (int i = 0; i < kTileVectors<T>; i++) v[i] += other.v[i];
  }
  SNN_HD void put(T* p) const {
    for (int i = 0; i < kTileVectors<T>; i++) store(p + i * kVectorLanes<T>, v[i]);
  }
};

inline int64_t tiles_of(int64_t columns) { return (columns + kTile - 1) / kTile; }

// The events of some rows, row by row and, within a row, run by run of the inputs.
class RowEvents {
 public:
  explicit RowEvents(const SnnSynapseForward& a)
      : runs_(std::max<int64_t>(a.chunks, 1)), inputs_(a.inputs), ends_(a.chunks ? a.chunk_ends : &inputs_) {}
  RowEvents(const RowEvents&) = delete;

  void list(const uint64_t* raster, int64_t rows) {
    const int64_t words = words_of(inputs_);
    int64_t count = 64;  // append_bits writes beyond the end
    for (int64_t i = 0; i < rows * words; i++) count += count_bits(raster[i]);
    uint32_t *begin = events_.room(count), *next = begin;
    int64_t* start = starts_.room(rows * runs_ + 1);
    for (int64_t r = 0; r < rows; r++, raster += words) {
      *start = next - begin;
      int64_t run = 1;
      for (int64_t w = 0; w < words; w++) {
        for (; run < runs_ && ends_[run - 1] < 64 * w + 64; run++)
          start[run] = next - begin + count_bits(raster[w] & lane_mask(ends_[run - 1] - 64 * w));
        next = append_bits(raster[w], static_cast<uint32_t>(64 * w), next);
      }
      for (; run < runs_; run++) start[run] = next - begin;
      start += runs_;
    }
    *start = next - begin;
  }
  int64_t runs() const { return runs_; }
  const uint32_t* events() { return events_.get(); }
  const int64_t* starts(int64_t row) { return starts_.get() + row * runs_; }  // those of its runs, and the end

 private:
  const int64_t runs_, inputs_;
  const int64_t* const ends_;
  Buffer<uint32_t, 2048> events_;
  Buffer<int64_t, 256> starts_;
};

// Some tiles side by side, kept in registers: the more, the fewer ends of loops, which processors predict badly.
template <class T, int kTiles> class CurrentTiles {
 public:
  CurrentTiles(const SnnSynapseForward& a, int64_t tile)
      : weight_(static_cast<const T*>(a.tiles) + tile * a.inputs * kTile), stride_(a.inputs * kTile), chunks_(a.chunks) {
    const int64_t lanes = std::min<int64_t>(kTiles * kTile, a.outputs - tile * kTile);
    std::fill(bias_, bias_ + kTiles * kTile, T(0));
    if (a.bias) std::copy_n(static_cast<const T*>(a.bias) + tile * kTile, lanes, bias_);
  }

  // Currents of a row: kTiles * kTile values.
  SNN_HD void sum(RowEvents& events, int64_t row, T* out) const {
    const uint32_t* event = events.events();
    const int64_t* start = events.starts(row);
    if (!chunks_) return run(event + start[0], event + start[1], bias_, nullptr, out);
    const T* before = bias_;
    for (int64_t k = 0; k < chunks_; k++, before = out) run(event + start[k], event + start[k + 1], nullptr, before, out);
  }

 private:
  // out = from + events, or, where they are summed from zero on, + `plus` afterwards
  SNN_HD void run(const uint32_t* event, const uint32_t* end, const T* from, const T* plus, T* out) const {
    TileSum<T> sum[kTiles];
    for (int i = 0; i < kTiles; i++) {
      if (from)
        sum[i].set(from + i * kTile);
      else
        sum[i].zero();
    }
    for (; event != end; event++)
      for (int i = 0; i < kTiles; i++) sum[i].add(weight_ + i * stride_ + static_cast<int64_t>(*event) * kTile);
    for (int i = 0; i < kTiles; i++) {
      if (plus) sum[i].add(plus + i * kTile);
      sum[i].put(out + i * kTile);
    }
  }

  const T* weight_;
  const int64_t stride_, chunks_;
  alignas(64) T bias_[kTiles * kTile];
};

// As many as leave registers free for the loads: there are 32 with AVX-512 and 16 otherwise.
#if defined(__AVX512F__)
template <class T> constexpr int kTilesAtOnce = sizeof(T) == 4 ? 2 : 1;
#else
template <class T> constexpr int kTilesAtOnce = 1;
#endif

}  // namespace SSB_ISA
}  // namespace snn
