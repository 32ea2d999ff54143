// The three products of a synapse, event by event. A tile is 64 output columns, kept in registers; rows are cut into
// blocks so that one tile of the gradients stays in the second-level cache. Each result is the sum over its events in
// row order, whatever the number of threads.
#include <algorithm>

#include "../raster.h"
#include "currents.h"
#include "kernels.h"
#include "parallel.h"

namespace snn {
namespace SSB_ISA {
namespace {

// ---------------------------------------------------------------------------------------------- weights

template <class T> int64_t pack(const SnnPackWeights& a) {
  const T* weight = static_cast<const T*>(a.weight);
  parallel_for(tiles_of(a.outputs), a.threads, [&](int64_t tile) {
    T* out = static_cast<T*>(a.tiles) + tile * a.inputs * kTile;
    const int64_t lanes = std::min<int64_t>(kTile, a.outputs - tile * kTile);
    constexpr int64_t kStrip = 16;  // inputs at a time: a cache line of every weight row
    for (int64_t j0 = 0; j0 < a.inputs; j0 += kStrip) {
      const int64_t j1 = std::min(a.inputs, j0 + kStrip);
      for (int64_t k = 0; k < lanes; k++) {
        const T* row = weight + (tile * kTile + k) * a.inputs;
        for (int64_t j = j0; j < j1; j++) out[j * kTile + k] = row[j];
      }
      for (int64_t j = j0; j < j1; j++) std::fill(out + j * kTile + lanes, out + (j + 1) * kTile, T(0));
    }
  });
  return 0;
}

// ---------------------------------------------------------------------------------------------- forward

// Rows of a block, over which weight tiles are reused from the second-level cache.
constexpr int64_t kForwardRows = 1024;

// Where there are few blocks, threads share the tiles of one; each lists its events for itself.
template <class T> int64_t forward(const SnnSynapseForward& a) {
  const int64_t tiles = tiles_of(a.outputs);
  if (!tiles || !a.rows) return 0;
  const int64_t block_rows = kForwardRows, blocks = (a.rows + block_rows - 1) / block_rows;
  const int64_t parts = blocks >= 8 * a.threads ? 1 : std::min<int64_t>(tiles, a.threads);
  parallel_for(blocks * parts, a.threads, [&](int64_t task) {
    const int64_t first = task / parts * block_rows, rows = std::min(block_rows, a.rows - first), part = task % parts;
    const int64_t words = words_of(a.inputs), end = tiles * (part + 1) / parts;
    RowEvents events(a);
    events.list(a.raster + first * words, rows);
    T* out = static_cast<T*>(a.current) + first * a.outputs;
    for (int64_t tile = tiles * part / parts; tile < end;) {
      const bool several = end - tile >= kTilesAtOnce<T> && (tile + kTilesAtOnce<T>)*kTile <= a.outputs;
      if (several) {
        const CurrentTiles<T, kTilesAtOnce<T>> current(a, tile);
        for (int64_t r = 0; r < rows; r++) current.sum(events, r, out + r * a.outputs + tile * kTile);
        tile += kTilesAtOnce<T>;
        continue;
      }
      const CurrentTiles<T, 1> current(a, tile);
      const int64_t lanes = std::min<int64_t>(kTile, a.outputs - tile * kTile);
      T padded[kTile];
      for (int64_t r = 0; r < rows; r++) {
        T* place = out + r * a.outputs + tile * kTile;
        current.sum(events, r, lanes == kTile ? place : padded);
        if (lanes < kTile) std::copy_n(padded, lanes, place);
      }
      tile++;
    }
  });
  return 0;
}

// ------------------------------------------------------------------------------- gradients, tile by tile

// One tile of a block of gradient rows, copied so that it lies together in the cache.
template <class T, class Arguments> class GradientTile {
 public:
  explicit GradientTile(const Arguments& a) : a_(a), copy_(a.block_rows * kTile) {}

  const T* rows(int64_t tile, int64_t first, int64_t rows) const {
    const T* source = static_cast<const T*>(a_.grad) + first * a_.outputs + tile * kTile;
    const int64_t lanes = std::min<int64_t>(kTile, a_.outputs - tile * kTile);
    for (int64_t r = 0; r < rows; r++) {
      T* out = copy_.get() + r * kTile;
      std::copy_n(source + r * a_.outputs, lanes, out);
      std::fill(out + lanes, out + kTile, T(0));
    }
    return copy_.get();
  }

 private:
  const Arguments& a_;
  Scratch<T> copy_;
};

template <class T> int64_t weight_gradient_of(const SnnWeightGradient& a) {
  const int64_t tiles = tiles_of(a.outputs), blocks = (a.rows + a.block_rows - 1) / a.block_rows;
  if (tiles == 0) return 0;
  // Narrow layers have fewer tiles than threads: then the inputs are split as well.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(a.inputs, 2 * a.threads / tiles));
  parallel_for(tiles * parts, a.threads, [&](int64_t task) {
    const int64_t tile = task / parts, part = task % parts;
    const int64_t j0 = a.inputs * part / parts, j1 = a.inputs * (part + 1) / parts;
    const int64_t lanes = std::min<int64_t>(kTile, a.outputs - tile * kTile);
    GradientTile<T, SnnWeightGradient> source(a);
    Scratch<T> sums((j1 - j0) * kTile);
    std::fill(sums.get(), sums.get() + (j1 - j0) * kTile, T(0));
    TileSum<T> bias;
    bias.zero();
    for (int64_t k = 0; k < blocks; k++) {
      const int64_t first = k * a.block_rows, rows = std::min(a.block_rows, a.rows - first);
      const T* grad = source.rows(tile, first, rows);
      const int64_t* start = a.start + k * (a.inputs + 1);
      for (int64_t j = j0; j < j1; j++) {
        int64_t e = start[j];
        const int64_t end = start[j + 1];
        if (e == end) continue;
        TileSum<T> even, odd;  // two chains hide the latency of the additions
        even.set(&sums[(j - j0) * kTile]);
        odd.zero();
        for (; e + 1 < end; e += 2) {
          even.add(grad + a.row[e] * kTile);
          odd.add(grad + a.row[e + 1] * kTile);
        }
        if (e < end) even.add(grad + a.row[e] * kTile);
        even.add(odd);
        even.put(&sums[(j - j0) * kTile]);
      }
      if (a.grad_bias && part == 0) {
        TileSum<T> block;
        block.zero();
        for (int64_t r = 0; r < rows; r++) block.add(grad + r * kTile);
        bias.add(block);
      }
    }
    for (int64_t k = 0; k < lanes; k++) {
      T* out = static_cast<T*>(a.grad_weight) + (tile * kTile + k) * a.inputs;
      for (int64_t j = j0; j < j1; j++) out[j] = sums[(j - j0) * kTile + k];
    }
    if (a.grad_bias && part == 0) {
      T padded[kTile];
      bias.put(padded);
      std::copy_n(padded, lanes, static_cast<T*>(a.grad_bias) + tile * kTile);
    }
  });
  return 0;
}

template <class T> SNN_HD Vector<T> products(const TileSum<T>& weight, const T* grad) {
  Vector<T> sum = weight.v[0] * load(grad);
  for (int i = 1; i < kTileVectors<T>; i++) sum += weight.v[i] * load(grad + i * kVectorLanes<T>);
  return sum;
}

// Four lanes that add up to the sum over all lanes. (Lanes are named one by one: g++ 11 has no __builtin_shufflevector,
// and others make the same shuffles of both.)
template <class T, int lanes> struct Lanes {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <class T> using Four = typename Lanes<T, 4>::type;
SNN_HD auto quarter(const Vector<double>& v) {
  return Four<double>{v[0], v[1], v[2], v[3]} + Four<double>{v[4], v[5], v[6], v[7]};
}
SNN_HD auto quarter(const Vector<float>& v) {
  using Eight = Lanes<float, 8>::type;
  const Eight h = Eight{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]} +
                  Eight{v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]};
  return Four<float>{h[0], h[1], h[2], h[3]} + Four<float>{h[4], h[5], h[6], h[7]};
}

// sums[i] += weight . grad[i], four rows at a time: their horizontal additions share the shuffles.
template <class T> SNN_HD void add_dots(const TileSum<T>& weight, const T* const* grad, T* sums) {
  const auto a = quarter(products(weight, grad[0])), b = quarter(products(weight, grad[1]));
  const auto c = quarter(products(weight, grad[2])), d = quarter(products(weight, grad[3]));
  const auto ab = Four<T>{a[0], b[0], a[1], b[1]} + Four<T>{a[2], b[2], a[3], b[3]};
  const auto cd = Four<T>{c[0], d[0], c[1], d[1]} + Four<T>{c[2], d[2], c[3], d[3]};
  const auto all = Four<T>{ab[0], ab[1], cd[0], cd[1]} + Four<T>{ab[2], ab[3], cd[2], cd[3]};
  for (int i = 0; i < 4; i++) sums[i] += all[i];
}
template <class T> SNN_HD void add_dot(const TileSum<T>& weight, const T* grad, T* sum) {
  const auto a = quarter(products(weight, grad));
  *sum += (a[0] + a[2]) + (a[1] + a[3]);  // the order of add_dots
}

template <class T> int64_t input_gradient_of(const SnnInputGradient& a) {
  const int64_t tiles = tiles_of(a.outputs), blocks = (a.rows + a.block_rows - 1) / a.block_rows;
  parallel_for(blocks, a.threads, [&](int64_t k) {
    const int64_t first = k * a.block_rows, rows = std::min(a.block_rows, a.rows - first);
    const int64_t* start = a.start + k * (a.inputs + 1);
    const int64_t base = start[0], events = start[a.inputs] - base;
    GradientTile<T, SnnInputGradient> source(a);
    Scratch<T> sums(events);
    std::fill(sums.get(), sums.get() + events, T(0));
    for (int64_t tile = 0; tile < tiles; tile++) {
      const T* grad = source.rows(tile, first, rows);
      const T* weights = static_cast<const T*>(a.tiles) + tile * a.inputs * kTile;
      for (int64_t j = 0; j < a.inputs; j++) {
        if (start[j] == start[j + 1]) continue;
        TileSum<T> weight;
        weight.set(weights + j * kTile);
        int64_t e = start[j];
        for (; e + 4 <= start[j + 1]; e += 4) {
          const T* rows_of[4];
          for (int i = 0; i < 4; i++) rows_of[i] = grad + a.row[e + i] * kTile;
          add_dots(weight, rows_of, &sums[e - base]);
        }
        for (; e < start[j + 1]; e++) add_dot(weight, grad + a.row[e] * kTile, &sums[e - base]);
      }
    }
    for (int64_t e = 0; e < events; e++) static_cast<T*>(a.grad_active)[a.rank[base + e]] = sums[e];
  });
  return 0;
}

}  // namespace

int64_t pack_weights(const SnnPackWeights& a) { return a.dtype == kFloat32 ? pack<float>(a) : pack<double>(a); }
int64_t synapse_forward(const SnnSynapseForward& a) {
  return a.dtype == kFloat32 ? forward<float>(a) : forward<double>(a);
}
int64_t weight_gradient(const SnnWeightGradient& a) {
  return a.dtype == kFloat32 ? weight_gradient_of<float>(a) : weight_gradient_of<double>(a);
}
int64_t input_gradient(const SnnInputGradient& a) {
  return a.dtype == kFloat32 ? input_gradient_of<float>(a) : input_gradient_of<double>(a);
}

}  // namespace SSB_ISA
}  // namespace snn
