// The 64 lanes of a raster word: packing comparisons into bits and gathering the chosen lanes, by the instructions
// made for it where there are any.
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

#if defined(__AVX512F__)

inline uint64_t nonzero_lanes(const float* lane) {
  uint64_t word = 0;
  for (int i = 0; i < 4; i++)
    word |= uint64_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(lane + 16 * i), _mm512_setzero_ps(), _CMP_NEQ_UQ)) << (16 * i);
  return word;
}
inline uint64_t nonzero_lanes(const double* lane) {
  uint64_t word = 0;
  for (int i = 0; i < 8; i++)
    word |= uint64_t(_mm512_cmp_pd_mask(_mm512_loadu_pd(lane + 8 * i), _mm512_setzero_pd(), _CMP_NEQ_UQ)) << (8 * i);
  return word;
}

// Writes the lanes whose bit is set, one after the other, and returns the end; may overwrite up to 64 values behind it.
inline float* append_lanes(const float* lane, uint64_t word, float* out) {
  for (int i = 0; i < 4; i++) {
    const __mmask16 mask = static_cast<__mmask16>(word >> (16 * i));
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(lane + 16 * i)));
    out += count_bits(mask);
  }
  return out;
}
inline double* append_lanes(const double* lane, uint64_t word, double* out) {
  for (int i = 0; i < 8; i++) {
    const __mmask8 mask = static_cast<__mmask8>(word >> (8 * i));
    _mm512_storeu_pd(out, _mm512_maskz_compress_pd(mask, _mm512_loadu_pd(lane + 8 * i)));
    out += count_bits(mask);
  }
  return out;
}

// The inverse: the lanes whose bit is set take the next packed values, the others 0. Reads up to 64 packed values.
inline const float* expand_lanes(const float* packed, uint64_t word, float* lane) {
  for (int i = 0; i < 4; i++) {
    const __mmask16 mask = static_cast<__mmask16>(word >> (16 * i));
    _mm512_storeu_ps(lane + 16 * i, _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(packed)));
    packed += count_bits(mask);
  }
  return packed;
}
inline const double* expand_lanes(const double* packed, uint64_t word, double* lane) {
  for (int i = 0; i < 8; i++) {
    const __mmask8 mask = static_cast<__mmask8>(word >> (8 * i));
    _mm512_storeu_pd(lane + 8 * i, _mm512_maskz_expand_pd(mask, _mm512_loadu_pd(packed)));
    packed += count_bits(mask);
  }
  return packed;
}

// Writes first + k for each set bit k and returns the end; may overwrite up to 64 values behind it.
inline uint32_t* append_bits(uint64_t word, uint32_t first, uint32_t* out) {
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
}

#else

#if defined(__AVX2__)
inline uint64_t nonzero_lanes(const float* lane) {
  uint64_t word = 0;
  for (int i = 0; i < 8; i++) {
    const __m256 differs = _mm256_cmp_ps(_mm256_loadu_ps(lane + 8 * i), _mm256_setzero_ps(), _CMP_NEQ_UQ);
    word |= uint64_t(static_cast<uint32_t>(_mm256_movemask_ps(differs))) << (8 * i);
  }
  return word;
}
inline uint64_t nonzero_lanes(const double* lane) {
  uint64_t word = 0;
  for (int i = 0; i < 16; i++) {
    const __m256d differs = _mm256_cmp_pd(_mm256_loadu_pd(lane + 4 * i), _mm256_setzero_pd(), _CMP_NEQ_UQ);
    word |= uint64_t(static_cast<uint32_t>(_mm256_movemask_pd(differs))) << (4 * i);
  }
  return word;
}
#else
template <class T> inline uint64_t nonzero_lanes(const T* lane) {
  uint64_t word = 0;
  for (int k = 0; k < 64; k++) word |= static_cast<uint64_t>(lane[k] != T(0)) << k;
  return word;
}
#endif

template <class T> inline T* append_lanes(const T* lane, uint64_t word, T* out) {
  for_each_bit(word, [&](int k) { *out++ = lane[k]; });
  return out;
}
template <class T> inline const T* expand_lanes(const T* packed, uint64_t word, T* lane) {
  for (int k = 0; k < 64; k++) lane[k] = T(0);
  for_each_bit(word, [&](int k) { lane[k] = *packed++; });
  return packed;
}
inline uint32_t* append_bits(uint64_t word, uint32_t first, uint32_t* out) {
#if defined(__AVX2__)
  const int bits = count_bits(word);
  for (int i = 0; i < bits; i += 4) append_four_bits(word, first, out + i);
  return out + bits;
#else
  for_each_bit(word, [&](int k) { *out++ = first + static_cast<uint32_t>(k); });
  return out;
#endif
}

#endif

}  // namespace SSB_ISA
}  // namespace snn
