// exp(x) without a call or a branch, so that compilers make vectors of loops over it; error below 2 units in the last
// place. Infinities and NaN come out as those of the library function, from the same arguments on.
#pragma once
#include <cstdint>
#include <cstring>

#include "portable.h"

namespace snn {

template <class T> struct ExponentialOf;
template <> struct ExponentialOf<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kDegree = 7;
  static constexpr float kLowest = -110, kHighest = 90;        // beyond them 0 and infinity
  static constexpr float kRound = 12582912;                    // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;  // ln 2; n * high is exact
};
template <> struct ExponentialOf<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kDegree = 13;
  static constexpr double kLowest = -750, kHighest = 712;
  static constexpr double kRound = 6755399441055744;           // 1.5 * 2^52
  static constexpr double kLog2High = 6.93145751953125e-1, kLog2Low = 1.42860682030941723212e-6;
};

constexpr double kInverseFactorials[] = {1, 1, 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320,
                                         1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};

// 2^n for a whole number n of the range of normal numbers.
template <class T> SNN_HD T power_of_two(T n) {
  using E = ExponentialOf<T>;
  const T one = 1, shifted = n + E::kRound;  // n is in its lowest bits
  typename E::Bits bits, of_one;
  std::memcpy(&bits, &shifted, sizeof(T));
  std::memcpy(&of_one, &one, sizeof(T));
  bits = (bits << E::kMantissa) + of_one;
  T power;
  std::memcpy(&power, &bits, sizeof(T));
  return power;
}

template <class T> SNN_HD T exponential(T x) {
#if defined(__CUDA_ARCH__)
  return std::exp(x);
#else
  using E = ExponentialOf<T>;
  x = x < E::kLowest ? E::kLowest : x;
  x = x > E::kHighest ? E::kHighest : x;
  const T n = (x * T(1.44269504088896340736) + E::kRound) - E::kRound;
  const T r = (x - n * E::kLog2High) - n * E::kLog2Low;  // |r| <= ln(2) / 2
  T sum = T(kInverseFactorials[E::kDegree]);  // of Taylor's series
  for (int k = E::kDegree - 1; k >= 0; k--) sum = sum * r + T(kInverseFactorials[k]);
  const T half = (n * T(0.5) + E::kRound) - E::kRound;  // 2^n alone may overflow where the result does not
  return sum * power_of_two(half) * power_of_two(n - half);
#endif
}

}  // namespace snn
