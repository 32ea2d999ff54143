// Rasters: packing, unpacking, transposing, and the column lists that the synapse products walk.
#include "../raster.h"

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "lanes.h"
#include "pack.h"
#include "parallel.h"

namespace snn {
namespace SSB_ISA {
namespace {

constexpr int64_t kRowsPerTask = 64;

// One word from up to 64 values; `odd` collects whether any value was neither 0 nor 1.
template <class T> inline uint64_t pack_word(const T* values, int64_t lanes, uint64_t& odd) {
  uint64_t word = 0;
  for_each_pack<Pack<T>>(lanes, [&](int k, auto count) {
    const Pack<T> x = load_lanes(values + k, count);
    const uint32_t bits = nonzero_bits(x);
    odd |= bits & nonzero_bits(x - Pack<T>(T(1)));
    word |= static_cast<uint64_t>(bits) << k;
  });
  return word;
}

template <class T> int64_t pack(const SnnRasterPack& a) {
  const int64_t words = words_of(a.cols), tasks = (a.rows + kRowsPerTask - 1) / kRowsPerTask;
  std::atomic<int64_t> ones{0};
  std::atomic<bool> odd{false};
  parallel_for(tasks, a.threads, [&](int64_t task) {
    uint64_t mine = 0;
    const int64_t end = std::min(a.rows, (task + 1) * kRowsPerTask);
    for (int64_t r = task * kRowsPerTask; r < end && !mine; r++) {
      const T* row = static_cast<const T*>(a.dense) + r * a.row_stride;
      for (int64_t w = 0; w < words; w++) {
        a.words[r * words + w] = pack_word(row + 64 * w, lanes_of(a.cols, w), mine);
      }
    }
    if (mine) return odd.store(true, std::memory_order_relaxed);
    const int64_t first = task * kRowsPerTask * words;
    ones.fetch_add(raster_count({a.words + first, end * words - first}), std::memory_order_relaxed);
  });
  return odd.load() ? -1 : ones.load();
}

template <class T> int64_t unpack(const SnnRasterUnpack& a) {
  const int64_t words = words_of(a.cols), tasks = (a.rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(tasks, a.threads, [&](int64_t task) {
    const int64_t end = std::min(a.rows, (task + 1) * kRowsPerTask);
    for (int64_t r = task * kRowsPerTask; r < end; r++)
      for (int64_t w = 0; w < words; w++) {
        T* out = static_cast<T*>(a.dense) + r * a.cols + 64 * w;
        const uint64_t word = a.words[r * words + w];
        for_each_pack<Pack<T>>(lanes_of(a.cols, w), [&](int k, auto lanes) {
          store_lanes(out + k, ones<Pack<T>>(word >> k), lanes);
        });
      }
  });
  return 0;
}

// In place: bit (i, j) of the 64 x 64 block goes to (j, i). Hacker's Delight, section 7-3.
void transpose_block(uint64_t* block) {
  uint64_t mask = 0x00000000FFFFFFFFull;
  for (int width = 32; width; width >>= 1, mask ^= mask << width)
    for (int i = 0; i < 64; i = (i + width + 1) & ~width) {
      const uint64_t swap = ((block[i] >> width) ^ block[i + width]) & mask;
      block[i] ^= swap << width;
      block[i + width] ^= swap;
    }
}

// Rows [first, first + 64) of column word `word`, transposed into block[64].
bool load_block(const uint64_t* words, int64_t stride, int64_t first, int64_t rows, int64_t word, uint64_t* block) {
  uint64_t any = 0;
  for (int64_t i = 0; i < 64; i++) {
    block[i] = i < rows ? words[(first + i) * stride + word] : 0;
    any |= block[i];
  }
  if (any) transpose_block(block);
  return any != 0;
}

// The column lists of block k, 64 columns at a time, sorted by counting. Its events, row by row, are `base` to `end`.
void columns_of_block(const SnnRasterColumns& a, int64_t k, int64_t base, int64_t end) {
  const int64_t words = words_of(a.cols), first = k * a.block_rows, rows = std::min(a.block_rows, a.rows - first);
  const uint64_t* raster = a.words + first * words;
  int64_t* const start = a.start + k * (a.cols + 1);
  Buffer<uint32_t, 2048> listed;
  Buffer<int64_t, 1024> before, shifts;
  uint32_t* const events = listed.room(end - base + 64);  // row * 64 + lane; append_bits writes beyond the end
  int64_t* const rank = before.room(a.rank ? rows : 0);   // the rank of the next event of each row
  int64_t* const shift = shifts.room(a.rank ? rows : 0);  // from places in the list to ranks
  for (int64_t r = 0, next = base; a.rank && r < rows; r++) {
    rank[r] = next;
    next += raster_count({raster + r * words, words});
  }
  int64_t place = base;
  for (int64_t w = 0; w < words; w++) {
    uint32_t* last = events;
    for (int64_t r = 0; r < rows; r++) {
      const uint64_t word = raster[r * words + w];
      if (a.rank) {
        shift[r] = rank[r] - (last - events);
        rank[r] += count_bits(word);
      }
      last = append_bits(word, static_cast<uint32_t>(64 * r), last);
    }
    // Stores wait for their cache lines one after the other: fetch those of these columns all at once.
    for (int64_t i = 0; a.rank && i < last - events; i += 8) __builtin_prefetch(a.rank + place + i, 1);
    int64_t next[64] = {};
    for (const uint32_t* event = events; event != last; event++) next[*event % 64]++;
    const int64_t lanes = lanes_of(a.cols, w);
    for (int64_t j = 0; j < lanes; j++) {
      start[64 * w + j] = place;
      place += next[j];
      next[j] = start[64 * w + j];
    }
    for (const uint32_t* event = events; event != last; event++) {
      const uint32_t row = *event / 64;
      const int64_t to = next[*event % 64]++;
      a.row[to] = static_cast<uint16_t>(row);
      if (a.rank) a.rank[to] = shift[row] + (event - events);
    }
  }
  start[a.cols] = place;
}

}  // namespace

int64_t raster_pack(const SnnRasterPack& a) { return a.dtype == kFloat32 ? pack<float>(a) : pack<double>(a); }
int64_t raster_unpack(const SnnRasterUnpack& a) { return a.dtype == kFloat32 ? unpack<float>(a) : unpack<double>(a); }

int64_t raster_transpose(const SnnRasterTranspose& a) {
  const int64_t words = words_of(a.cols), out_words = words_of(a.rows);
  parallel_for(out_words, a.threads, [&](int64_t band) {
    uint64_t block[64];
    for (int64_t w = 0; w < words; w++) {
      load_block(a.words, words, 64 * band, lanes_of(a.rows, band), w, block);
      const int64_t lanes = lanes_of(a.cols, w);
      for (int64_t k = 0; k < lanes; k++) a.transposed[(64 * w + k) * out_words + band] = block[k];
    }
  });
  return 0;
}

int64_t raster_count(const SnnRasterCount& a) {
  int64_t total = 0;
  for (int64_t i = 0; i < a.count; i++) total += count_bits(a.words[i]);
  return total;
}

int64_t raster_columns(const SnnRasterColumns& a) {
  const int64_t words = words_of(a.cols), blocks = (a.rows + a.block_rows - 1) / a.block_rows;
  Buffer<int64_t, 128> first_events;
  int64_t *first_event = first_events.room(blocks + 1), total = 0;
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t first = k * a.block_rows, rows = std::min(a.block_rows, a.rows - first);
    first_event[k] = total;
    total += raster_count({a.words + first * words, rows * words});
  }
  first_event[blocks] = total;
  parallel_for(blocks, a.threads, [&](int64_t k) { columns_of_block(a, k, first_event[k], first_event[k + 1]); });
  return total;
}

}  // namespace SSB_ISA
}  // namespace snn
