// The bits of a raster word, by the instructions made for them where there are any.
#pragma once
#include <cstdint>

#include "../raster.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace snn {
namespace SSB_ISA {

inline uint64_t lane_mask(int64_t lanes) { return lanes == 64 ? ~uint64_t(0) : (uint64_t(1) << lanes) - 1; }

#if defined(__AVX2__)
// Writes first + k for the four lowest set bits k, without asking whether there are so many, and clears them. (A
// processor with AVX2 has BMI.)
inline void append_four_bits(uint64_t& word, uint32_t first, uint32_t* out) {
  for (int i = 0; i < 4; i++, word = _blsr_u64(word)) out[i] = first + static_cast<uint32_t>(_tzcnt_u64(word));
}
#endif

// Writes first + k for each set bit k and returns the end; may overwrite up to 64 values behind it.
inline uint32_t* append_bits(uint64_t word, uint32_t first, uint32_t* out) {
#if defined(__AVX512F__)
  const int bits = count_bits(word);
  if (bits <= 4) {  // most sparse words
    append_four_bits(word, first, out);
    return out + bits;
  }
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int i = 0; i < 4; i++) {
    const __mmask16 mask = static_cast<__mmask16>(word >> (16 * i));
    const __m512i index = _mm512_add_epi32(count, _mm512_set1_epi32(static_cast<int>(first) + 16 * i));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, index));
    out += count_bits(mask);
  }
  return out;
#elif defined(__AVX2__)
  const int bits = count_bits(word);
  for (int i = 0; i < bits; i += 4) append_four_bits(word, first, out + i);
  return out + bits;
#else
  for_each_bit(word, [&](int k) { *out++ = first + static_cast<uint32_t>(k); });
  return out;
#endif
}

}  // namespace SSB_ISA
}  // namespace snn
