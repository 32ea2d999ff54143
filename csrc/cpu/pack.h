// The number type that neuron structs run on here: the lanes of one register. A comparison gives 0 or 1 in each lane,
// or the bits of a raster.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../portable.h"
#include "../raster.h"
#include "parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace snn {
namespace SSB_ISA {

template <class T> struct PackOf;
template <> struct PackOf<float> {
  typedef float Lanes __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
  using Integer = int32_t;
};
template <> struct PackOf<double> {
  typedef double Lanes __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
  using Integer = int64_t;
};

template <class T> struct Pack {
  using Scalar = T;
  using Lanes = typename PackOf<T>::Lanes;
  using Mask = typename PackOf<T>::Mask;
  static constexpr int kLanes = kVectorBytes / sizeof(T), kPerWord = 64 / kLanes;
  Lanes v;

  Pack() = default;
  SNN_HD explicit Pack(T value) : v(Lanes{} + value) {}
  SNN_HD explicit Pack(const Lanes& lanes) : v(lanes) {}

  SNN_HD static Pack load(const T* p) { return Pack(static_cast<Lanes>(*reinterpret_cast<const Vector<T>*>(p))); }
  SNN_HD void store(T* p) const { *reinterpret_cast<Vector<T>*>(p) = v; }

  SNN_HD friend Pack operator+(const Pack& a, const Pack& b) { return Pack(a.v + b.v); }
  SNN_HD friend Pack operator-(const Pack& a, const Pack& b) { return Pack(a.v - b.v); }
  SNN_HD friend Pack operator*(const Pack& a, const Pack& b) { return Pack(a.v * b.v); }
  SNN_HD friend Pack operator/(const Pack& a, const Pack& b) { return Pack(a.v / b.v); }
  SNN_HD friend Pack operator-(const Pack& a) { return Pack(-a.v); }
};

// positive(), relu(): as in site.h. ones(): 1 where a bit is set.
#if defined(__AVX512F__)

// A mask as a number. g++ 12 may spill a mask in its own width and read it back in that of the number.
SNN_HD uint32_t number(__mmask16 mask) {
  uint32_t bits;
  asm("kmovw %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}
SNN_HD uint32_t number(__mmask8 mask) {
  uint32_t bits;
  asm("kmovb %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}
SNN_HD uint32_t nonzero_bits(const Pack<float>& x) {
  return number(_mm512_cmp_ps_mask((__m512)x.v, _mm512_setzero_ps(), _CMP_NEQ_UQ));
}
SNN_HD uint32_t nonzero_bits(const Pack<double>& x) {
  return number(_mm512_cmp_pd_mask((__m512d)x.v, _mm512_setzero_pd(), _CMP_NEQ_UQ));
}
SNN_HD uint32_t inside_bits(const Pack<float>& x, const Pack<float>& low, const Pack<float>& high) {
  const __mmask16 above = _mm512_cmp_ps_mask((__m512)x.v, (__m512)low.v, _CMP_NLE_UQ);
  return number(_mm512_mask_cmp_ps_mask(above, (__m512)x.v, (__m512)high.v, _CMP_NGE_UQ));
}
SNN_HD uint32_t inside_bits(const Pack<double>& x, const Pack<double>& low, const Pack<double>& high) {
  const __mmask8 above = _mm512_cmp_pd_mask((__m512d)x.v, (__m512d)low.v, _CMP_NLE_UQ);
  return number(_mm512_mask_cmp_pd_mask(above, (__m512d)x.v, (__m512d)high.v, _CMP_NGE_UQ));
}
SNN_HD Pack<float> ones(const Pack<float>&, uint64_t bits) {
  return Pack<float>(_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), _mm512_set1_ps(1)));
}
SNN_HD Pack<double> ones(const Pack<double>&, uint64_t bits) {
  return Pack<double>(_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), _mm512_set1_pd(1)));
}
SNN_HD Pack<float> positive(const Pack<float>& x) {
  return ones(x, _mm512_cmp_ps_mask((__m512)x.v, _mm512_setzero_ps(), _CMP_GT_OQ));
}
SNN_HD Pack<double> positive(const Pack<double>& x) {
  return ones(x, _mm512_cmp_pd_mask((__m512d)x.v, _mm512_setzero_pd(), _CMP_GT_OQ));
}
SNN_HD Pack<float> relu(const Pack<float>& x) {
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x.v, _mm512_setzero_ps(), _CMP_NLT_UQ);
  return Pack<float>(_mm512_maskz_mov_ps(kept, (__m512)x.v));
}
SNN_HD Pack<double> relu(const Pack<double>& x) {
  const __mmask8 kept = _mm512_cmp_pd_mask((__m512d)x.v, _mm512_setzero_pd(), _CMP_NLT_UQ);
  return Pack<double>(_mm512_maskz_mov_pd(kept, (__m512d)x.v));
}
SNN_HD Pack<float> load_some(const float* p, int lanes) {
  return Pack<float>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes) - 1), p));
}
SNN_HD Pack<double> load_some(const double* p, int lanes) {
  return Pack<double>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << lanes) - 1), p));
}
SNN_HD void store_some(float* p, const Pack<float>& x, int lanes) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << lanes) - 1), (__m512)x.v);
}
SNN_HD void store_some(double* p, const Pack<double>& x, int lanes) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << lanes) - 1), (__m512d)x.v);
}
// Writes the lanes whose bit is set, one after the other, and returns the end; may write a whole pack.
SNN_HD float* append(const Pack<float>& x, uint64_t bits, float* out) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), (__m512)x.v));
  return out + count_bits(static_cast<__mmask16>(bits));
}
SNN_HD double* append(const Pack<double>& x, uint64_t bits, double* out) {
  _mm512_storeu_pd(out, _mm512_maskz_compress_pd(static_cast<__mmask8>(bits), (__m512d)x.v));
  return out + count_bits(static_cast<__mmask8>(bits));
}
// The inverse: the lanes whose bit is set take the next values, which `packed` moves past; the others take 0.
SNN_HD Pack<float> take(const float*& packed, uint64_t bits) {
  const __mmask16 mask = static_cast<__mmask16>(bits);
  const Pack<float> x(_mm512_maskz_expandloadu_ps(mask, packed));
  packed += count_bits(mask);
  return x;
}
SNN_HD Pack<double> take(const double*& packed, uint64_t bits) {
  const __mmask8 mask = static_cast<__mmask8>(bits);
  const Pack<double> x(_mm512_maskz_expandloadu_pd(mask, packed));
  packed += count_bits(mask);
  return x;
}

#else

SNN_HD uint32_t mask_bits(const Pack<float>::Mask& mask) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int k = 0; k < Pack<float>::kLanes; k++) bits |= (mask[k] & 1) << k;
  return bits;
#endif
}
SNN_HD uint32_t mask_bits(const Pack<double>::Mask& mask) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#else
  uint32_t bits = 0;
  for (int k = 0; k < Pack<double>::kLanes; k++) bits |= static_cast<uint32_t>(mask[k] & 1) << k;
  return bits;
#endif
}
template <class T> SNN_HD uint32_t nonzero_bits(const Pack<T>& x) {
  return mask_bits(x.v != typename Pack<T>::Lanes{});
}
template <class T> SNN_HD uint32_t inside_bits(const Pack<T>& x, const Pack<T>& low, const Pack<T>& high) {
  return mask_bits(~((x.v <= low.v) | (x.v >= high.v)));
}
template <class T> SNN_HD Pack<T> chosen_ones(const typename Pack<T>::Mask& chosen) {
  using Mask = typename Pack<T>::Mask;
  return Pack<T>((typename Pack<T>::Lanes)(chosen & (Mask)Pack<T>(T(1)).v));
}
template <class T> SNN_HD Pack<T> positive(const Pack<T>& x) { return chosen_ones<T>(x.v > typename Pack<T>::Lanes{}); }
template <class T> SNN_HD Pack<T> relu(const Pack<T>& x) {
  using Mask = typename Pack<T>::Mask;
  return Pack<T>((typename Pack<T>::Lanes)((Mask)x.v & ~(x.v < typename Pack<T>::Lanes{})));
}
template <class T> SNN_HD Pack<T> ones(const Pack<T>&, uint64_t bits) {
  using Integer = typename PackOf<T>::Integer;
  typename Pack<T>::Mask lane = {};
  for (int k = 0; k < Pack<T>::kLanes; k++) lane[k] = Integer(1) << k;
  return chosen_ones<T>((lane & static_cast<Integer>(bits)) != 0);
}
template <class T> SNN_HD Pack<T> load_some(const T* p, int lanes) {
  T lane[Pack<T>::kLanes] = {};
  std::memcpy(lane, p, lanes * sizeof(T));
  return Pack<T>::load(lane);
}
template <class T> SNN_HD void store_some(T* p, const Pack<T>& x, int lanes) {
  T lane[Pack<T>::kLanes];
  x.store(lane);
  std::memcpy(p, lane, lanes * sizeof(T));
}
template <class T> SNN_HD T* append(const Pack<T>& x, uint64_t bits, T* out) {
  T lane[Pack<T>::kLanes];
  x.store(lane);
  for_each_bit(bits & ((1u << Pack<T>::kLanes) - 1), [&](int k) { *out++ = lane[k]; });
  return out;
}
template <class T> SNN_HD Pack<T> take(const T*& packed, uint64_t bits) {
  T lane[Pack<T>::kLanes] = {};
  for_each_bit(bits & ((1u << Pack<T>::kLanes) - 1), [&](int k) { lane[k] = *packed++; });
  return Pack<T>::load(lane);
}

#endif

// All lanes, or the first ones; `lanes` is a constant in the common case.
template <class T> SNN_HD Pack<T> load_lanes(const T* p, int lanes) {
  return lanes == Pack<T>::kLanes ? Pack<T>::load(p) : load_some(p, lanes);
}
template <class T> SNN_HD void store_lanes(T* p, const Pack<T>& x, int lanes) {
  if (lanes == Pack<T>::kLanes)
    x.store(p);
  else
    store_some(p, x, lanes);
}
template <class P> SNN_HD P ones(uint64_t bits) { return ones(P(), bits); }

// The packs of a unit of `lanes` sites one after the other: body(first lane, lanes).
template <class P, class Body> SNN_HD void for_each_pack(int64_t lanes, Body body) {
  if (lanes == 64) {
    for (int i = 0; i < P::kPerWord; i++) body(i * P::kLanes, std::integral_constant<int, P::kLanes>());
    return;
  }
  int64_t k = 0;
  for (; k + P::kLanes <= lanes; k += P::kLanes) body(static_cast<int>(k), std::integral_constant<int, P::kLanes>());
  if (k < lanes) body(static_cast<int>(k), static_cast<int>(lanes - k));
}

}  // namespace SSB_ISA
}  // namespace snn
