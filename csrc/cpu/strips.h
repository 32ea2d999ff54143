// Strips: some vectors of columns side by side, kept in registers while a list of events is walked. The wider, the
// fewer ends of lists, which processors predict badly, but the more cache the rows of a strip take.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../abi.h"
#include "parallel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace snn {
namespace SSB_ISA {

constexpr int kStripVectors = 8;  // of the widest strip; leaves registers for what is added to it

template <class T, int kVectors> struct Strip {
  static constexpr int kLanes = kVectorLanes<T>, kColumns = kVectors * kLanes;
  Vector<T> v[kVectors];

  SNN_HD void zero() {
    for (int i = 0; i < kVectors; i++) v[i] = Vector<T>{};
  }
  SNN_HD void set(const T* p) {
    for (int i = 0; i < kVectors; i++) v[i] = load(p + i * kLanes);
  }
  SNN_HD void add(const T* p) {
    for (int i = 0; i < kVectors; i++) v[i] += load(p + i * kLanes);
  }
  SNN_HD void add(const Strip& other) {
    for (int i = 0; i < kVectors; i++) v[i] += other.v[i];
  }
  SNN_HD void put(T* p) const {
    for (int i = 0; i < kVectors; i++) store(p + i * kLanes, v[i]);
  }
  // A row of packed weights, which may lie in two tiles, `stride` apart.
  SNN_HD void set_weights(const T* p, int64_t stride) {
    for (int i = 0; i < kVectors; i++) v[i] = load(p + i * kLanes / kTile * stride + i * kLanes % kTile);
  }
  SNN_HD void add_weights(const T* p, int64_t stride) {
    for (int i = 0; i < kVectors; i++) v[i] += load(p + i * kLanes / kTile * stride + i * kLanes % kTile);
  }
};

// Calls body(std::integral_constant<int, V>) with the vectors, at most kMost, that so many columns need.
template <class T, int kMost, class Body> inline void visit_vectors(int64_t columns, Body body) {
  if constexpr (kMost > 1)
    if (columns <= (kMost - 1) * kVectorLanes<T>) return visit_vectors<T, kMost - 1>(columns, body);
  body(std::integral_constant<int, kMost>());
}

// Rows of one strip, copied so that they lie together in the cache; columns that do not exist are 0.
template <class T, int kVectors> class StripRows {
 public:
  static constexpr int64_t kColumns = Strip<T, kVectors>::kColumns;

  // The strip that begins at column `first`.
  StripRows(int64_t most_rows, int64_t columns, int64_t first)
      : first_(first), lanes_(std::min(kColumns, columns - first)), stride_(columns), copy_(most_rows * kColumns) {}

  int64_t lanes() const { return lanes_; }
  const T* copy(const T* matrix, int64_t rows) const {
    const T* source = matrix + first_;
    T* out = copy_.get();
    if (lanes_ == kColumns) {
      for (int64_t r = 0; r < rows; r++, source += stride_, out += kColumns) {

        Strip<T, kVectors> row;
        row.set(source);
        row.put(out);
      }
    } else {
      for (int64_t r = 0; r < rows; r++, source += stride_, out += kColumns) {
        for (int64_t k = 0; k < lanes_; k++) out[k] = source[k];
        for (int64_t k = lanes_; k < kColumns; k++) out[k] = T(0);
      }
    }
    return copy_.get();
  }

 private:
  const int64_t first_, lanes_, stride_;
  Scratch<T> copy_;
};

// ------------------------------------------------------------------------------------------------ transposing

// A square of numbers whose rows are vectors.
template <class T> struct Square {
  static constexpr int kSide = kVectorLanes<T>;
  Vector<T> row[kSide];
};

// Of each 128 bits the lower or the higher half of both, lane by lane or in pairs of lanes. (With masks that choose
// all: the headers of g++ 12 warn about the plain forms.)
#if defined(__AVX512F__)
SNN_HD __m512 low_lanes(const __m512& a, const __m512& b) { return _mm512_maskz_unpacklo_ps(0xffff, a, b); }
SNN_HD __m512 high_lanes(const __m512& a, const __m512& b) { return _mm512_maskz_unpackhi_ps(0xffff, a, b); }
SNN_HD __m512d low_lanes(const __m512d& a, const __m512d& b) { return _mm512_maskz_unpacklo_pd(0xff, a, b); }
SNN_HD __m512d high_lanes(const __m512d& a, const __m512d& b) { return _mm512_maskz_unpackhi_pd(0xff, a, b); }
SNN_HD __m512 low_pairs(const __m512& a, const __m512& b) { return (__m512)low_lanes((__m512d)a, (__m512d)b); }
SNN_HD __m512 high_pairs(const __m512& a, const __m512& b) { return (__m512)high_lanes((__m512d)a, (__m512d)b); }
// Of four quarters of both the even or the odd ones.
SNN_HD __m512 even_quarters(const __m512& a, const __m512& b) { return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88); }
SNN_HD __m512 odd_quarters(const __m512& a, const __m512& b) { return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd); }
SNN_HD __m512d even_quarters(const __m512d& a, const __m512d& b) {
  return _mm512_maskz_shuffle_f64x2(0xff, a, b, 0x88);
}
SNN_HD __m512d odd_quarters(const __m512d& a, const __m512d& b) {
  return _mm512_maskz_shuffle_f64x2(0xff, a, b, 0xdd);
}

SNN_HD void transpose(Square<float>& square) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = low_lanes(square.row[i], square.row[i + 1]);
    b[i + 1] = high_lanes(square.row[i], square.row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; k++) {
      a[i + 2 * k] = low_pairs(b[i + k], b[i + k + 2]);
      a[i + 2 * k + 1] = high_pairs(b[i + k], b[i + k + 2]);
    }
  for (int half = 0; half < 16; half += 8)
    for (int i = half; i < half + 4; i++) {
      b[i] = even_quarters(a[i], a[i + 4]);
      b[i + 4] = odd_quarters(a[i], a[i + 4]);
    }
  for (int i = 0; i < 8; i++) {
    square.row[i] = even_quarters(b[i], b[i + 8]);
    square.row[i + 8] = odd_quarters(b[i], b[i + 8]);
  }
}
SNN_HD void transpose(Square<double>& square) {
  __m512d a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = low_lanes(square.row[i], square.row[i + 1]);
    a[i + 1] = high_lanes(square.row[i], square.row[i + 1]);
  }
  for (int half = 0; half < 8; half += 4)
    for (int i = half; i < half + 2; i++) {
      b[i] = even_quarters(a[i], a[i + 2]);
      b[i + 2] = odd_quarters(a[i], a[i + 2]);
    }
  for (int i = 0; i < 4; i++) {
    square.row[i] = even_quarters(b[i], b[i + 4]);
    square.row[i + 4] = odd_quarters(b[i], b[i + 4]);
  }
}
#elif defined(__AVX2__)
SNN_HD __m256 low_pairs(const __m256& a, const __m256& b) {
  return (__m256)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
}
SNN_HD __m256 high_pairs(const __m256& a, const __m256& b) {
  return (__m256)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
}

SNN_HD void transpose(Square<float>& square) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(square.row[i], square.row[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(square.row[i], square.row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; k++) {
      a[i + 2 * k] = low_pairs(b[i + k], b[i + k + 2]);
      a[i + 2 * k + 1] = high_pairs(b[i + k], b[i + k + 2]);
    }
  for (int i = 0; i < 4; i++) {
    square.row[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    square.row[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
}
SNN_HD void transpose(Square<double>& square) {
  __m256d a[4];
  for (int i = 0; i < 4; i += 2) {
    a[i] = _mm256_unpacklo_pd(square.row[i], square.row[i + 1]);
    a[i + 1] = _mm256_unpackhi_pd(square.row[i], square.row[i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    square.row[i] = _mm256_permute2f128_pd(a[i], a[i + 2], 0x20);
    square.row[i + 2] = _mm256_permute2f128_pd(a[i], a[i + 2], 0x31);
  }
}
#else
template <class T> SNN_HD void transpose(Square<T>& square) {
  for (int i = 0; i < Square<T>::kSide; i++)
    for (int k = 0; k < i; k++) {
      const T other = square.row[i][k];
      square.row[i][k] = square.row[k][i];
      square.row[k][i] = other;
    }
}
#endif

// out[j * out_stride + i] = in[i * in_stride + j] for i < rows, j < cols, both at most kSide.
template <class T>
SNN_HD void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t cols, T* out, int64_t out_stride) {
  constexpr int64_t side = Square<T>::kSide;
  if (rows < side || cols < side) {
    for (int64_t j = 0; j < cols; j++)
      for (int64_t i = 0; i < rows; i++) out[j * out_stride + i] = in[i * in_stride + j];
    return;
  }
  Square<T> square;
  for (int64_t i = 0; i < side; i++) square.row[i] = load(in + i * in_stride);
  transpose(square);
  for (int64_t j = 0; j < side; j++) store(out + j * out_stride, square.row[j]);
}

// The same for any rows and cols, square by square.
template <class T>
void transpose_all(const T* in, int64_t in_stride, int64_t rows, int64_t cols, T* out, int64_t out_stride) {
  constexpr int64_t side = Square<T>::kSide;
  for (int64_t i = 0; i < rows; i += side)
    for (int64_t j = 0; j < cols; j += side) {
      const int64_t height = std::min(side, rows - i), width = std::min(side, cols - j);
      T* to = out + j * out_stride + i;
      // Stores wait for their cache lines one after the other: fetch those of the next square below all at once.
      for (int64_t k = 0; k < width; k++) __builtin_prefetch(to + k * out_stride + side, 1);
      transpose(in + i * in_stride + j, in_stride, height, width, to, out_stride);
    }
}

}  // namespace SSB_ISA
}  // namespace snn
