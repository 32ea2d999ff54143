// Packed bit rows: 64 sites a word, the lowest bit first; bits beyond the last column are zero.
#pragma once
#include "abi.h"
#include "portable.h"

namespace snn {

SNN_HD int64_t words_of(int64_t cols) { return (cols + 63) / 64; }
SNN_HD int64_t lanes_of(int64_t cols, int64_t word) {
  int64_t rest = cols - 64 * word;
  return rest < 64 ? rest : 64;
}
SNN_HD bool test_bit(const uint64_t* row, int64_t column) { return row[column >> 6] >> (column & 63) & 1; }

SNN_HD int count_bits(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}
SNN_HD int lowest_bit(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return __builtin_ctzll(word);
#endif
}

// Calls visit(index) for each set bit, lowest first.
template <class Visit> SNN_HD void for_each_bit(uint64_t word, Visit visit) {
  for (; word; word &= word - 1) visit(lowest_bit(word));
}

}  // namespace snn
