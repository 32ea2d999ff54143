// Sums of weight columns, row by row: the currents that the events of a raster cause.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../abi.h"
#include "../raster.h"
#include "lanes.h"
#include "parallel.h"
#include "strips.h"

namespace snn {
namespace SSB_ISA {

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

// Some tiles side by side.
template <class T, int kTiles> class CurrentTiles {
  using Sum = Strip<T, std::min(kStripVectors, kTiles * kTile / kVectorLanes<T>)>;

 public:
  CurrentTiles(const SnnSynapseForward& a, int64_t tile)
      : weight_(static_cast<const T*>(a.tiles) + tile * a.inputs * kTile), stride_(a.inputs * kTile),
        chunks_(a.chunks - a.apart), apart_(a.apart) {
    const int64_t lanes = std::min<int64_t>(kTiles * kTile, a.outputs - tile * kTile);
    std::fill(bias_, bias_ + kTiles * kTile, T(0));
    if (a.bias) std::copy_n(static_cast<const T*>(a.bias) + tile * kTile, lanes, bias_);
  }

  // Currents of a row: kTiles * kTile values.
  SNN_HD void sum(RowEvents& events, int64_t row, T* out) const {
    const uint32_t* event = events.events();
    const int64_t* start = events.starts(row);
    for (int64_t k = 0; k < kTiles * kTile; k += Sum::kColumns) {
      const T *weight = weight_ + k / kTile * stride_ + k % kTile, *before = bias_ + k;
      if (!chunks_) run(weight, event + start[0], event + start[1], before, nullptr, out + k);
      for (int64_t i = 0; i < chunks_; i++, before = out + k)
        run(weight, event + start[i], event + start[i + 1], nullptr, before, out + k);
      if (apart_) add_apart(weight, event, start + chunks_, out + k);
    }
  }

 private:
  SNN_HD void add_apart(const T* weight, const uint32_t* event, const int64_t* start, T* out) const {
    T among[Sum::kColumns] = {};
    for (int64_t i = 0; i < apart_; i++)
      run(weight, event + start[i], event + start[i + 1], nullptr, i ? among : nullptr, among);
    Sum total;
    total.set(out);
    total.add(among);
    total.put(out);
  }

  // out = from + events, or, where they are summed from zero on, + `plus` afterwards
  SNN_HD void run(const T* weight, const uint32_t* event, const uint32_t* end, const T* from, const T* plus,
                  T* out) const {
    Sum sum;
    if (from)
      sum.set(from);
    else
      sum.zero();
    for (; event != end; event++) sum.add_weights(weight + static_cast<int64_t>(*event) * kTile, stride_);
    if (plus) sum.add(plus);
    sum.put(out);
  }

  const T* weight_;
  const int64_t stride_, chunks_, apart_;
  alignas(64) T bias_[kTiles * kTile];
};

// As many as the widest strip spans.
template <class T> constexpr int kTilesAtOnce = std::max<int>(1, Strip<T, kStripVectors>::kColumns / kTile);

}  // namespace SSB_ISA
}  // namespace snn
