// The weights and the forward product of a synapse. A tile is 64 output columns, kept in registers while the events of
// a row are walked.
#include <algorithm>

#include "../raster.h"
#include "currents.h"
#include "kernels.h"
#include "parallel.h"
#include "strips.h"

namespace snn {
namespace SSB_ISA {
namespace {

// ---------------------------------------------------------------------------------------------- weights

template <class T> int64_t pack(const SnnPackWeights& a) {
  constexpr int64_t side = Square<T>::kSide;
  parallel_for(tiles_of(a.outputs), a.threads, [&](int64_t tile) {
    const T* weight = static_cast<const T*>(a.weight) + tile * kTile * a.inputs;
    T* out = static_cast<T*>(a.tiles) + tile * a.inputs * kTile;
    const int64_t lanes = std::min<int64_t>(kTile, a.outputs - tile * kTile);
    for (int64_t j = 0; j < a.inputs; j += side) {
      const int64_t width = std::min(side, a.inputs - j);
      for (int64_t k = 0; k < lanes; k += side)
        transpose(weight + k * a.inputs + j, a.inputs, std::min(side, lanes - k), width, out + j * kTile + k, kTile);
      for (int64_t i = j; lanes < kTile && i < j + width; i++)
        std::fill(out + i * kTile + lanes, out + (i + 1) * kTile, T(0));
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
        for (int64_t r = 0; r < rows; r++) {
          T* place = out + r * a.outputs + tile * kTile;
          // Stores wait for their cache lines one after the other: fetch those of a later row all at once.
          for (int64_t k = 0; k < kTilesAtOnce<T> * kTile; k += kVectorLanes<T>)
            __builtin_prefetch(place + 2 * a.outputs + k, 1);
          current.sum(events, r, place);
        }
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

}  // namespace

int64_t pack_weights(const SnnPackWeights& a) { return a.dtype == kFloat32 ? pack<float>(a) : pack<double>(a); }
int64_t synapse_forward(const SnnSynapseForward& a) {
  return a.dtype == kFloat32 ? forward<float>(a) : forward<double>(a);
}

}  // namespace SSB_ISA
}  // namespace snn
