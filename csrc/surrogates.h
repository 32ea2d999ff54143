// One functor per surrogate derivative: upstream gradient times derivative at x = u - threshold, in the order
// of operations of the host library's own backward (so overflow and NaN come out as they do there).
#pragma once
#include "abi.h"
#include "exponential.h"
#include "portable.h"

enum SnnSurrogateKind : int32_t {
  kZeroDerivative = 0,
  kAtan,
  kFastSigmoid,
  kSigmoid,
  kStraightThrough,
  kTriangular,
  kStep,
  kSpikeRateEscape,
  kSuperSpike,
  kTriangle,
  kTanh,
  kCirc,
  kErfc,
  kGiven,
};

namespace snn {

template <class T> struct ZeroDerivative {
  SNN_HD T operator()(T, T) const { return T(0); }
};
// snntorch/surrogate.py ATan: alpha / 2 / (1 + (pi / 2 * alpha * x)^2)
template <class T> struct Atan {
  T half_alpha, scale;
  SNN_HD explicit Atan(const SnnSurrogate& s) : half_alpha(T(s.a / 2)), scale(T(1.57079632679489661923 * s.a)) {}
  SNN_HD T operator()(T x, T g) const {
    T y = scale * x;
    return half_alpha / (T(1) + y * y) * g;
  }
};
// snntorch/surrogate.py FastSigmoid (and SFS inside its half line): 1 / (slope |x| + 1)^2
template <class T> struct FastSigmoid {
  T slope;
  SNN_HD explicit FastSigmoid(const SnnSurrogate& s) : slope(T(s.a)) {}
  SNN_HD T operator()(T x, T g) const {
    T y = slope * std::fabs(x) + T(1);
    return g / (y * y);
  }
};
// snntorch/surrogate.py Sigmoid: slope e / (e + 1)^2, e = exp(-slope x)
template <class T> struct Sigmoid {
  T slope;
  SNN_HD explicit Sigmoid(const SnnSurrogate& s) : slope(T(s.a)) {}
  SNN_HD T operator()(T x, T g) const {
    T e = exponential(-slope * x), d = e + T(1);
    return g * slope * e / (d * d);
  }
};
// snntorch/surrogate.py StraightThroughEstimator
template <class T> struct StraightThrough {
  SNN_HD T operator()(T, T g) const { return g; }
};
// snntorch/surrogate.py Triangular: +threshold below, -threshold from 0 on
template <class T> struct Triangular {
  T threshold;
  SNN_HD explicit Triangular(const SnnSurrogate& s) : threshold(T(s.a)) {}
  SNN_HD T operator()(T x, T g) const { return x >= T(0) ? -(g * threshold) : g * threshold; }
};
// snntorch/surrogate.py Heaviside: 1 where it spikes (so 0, not NaN, at a NaN membrane)
template <class T> struct Step {
  SNN_HD T operator()(T x, T g) const { return g * (x > T(0) ? T(1) : T(0)); }
};
// snntorch/surrogate.py SpikeRateEscape: slope exp(-beta |x - 1|), a = beta, b = slope
template <class T> struct SpikeRateEscape {
  T beta, slope;
  SNN_HD explicit SpikeRateEscape(const SnnSurrogate& s) : beta(T(s.a)), slope(T(s.b)) {}
  SNN_HD T operator()(T x, T g) const { return g * slope * exponential(-beta * std::fabs(x - T(1))); }
};
// norse superspike.py: 1 / (alpha |x| + 1)^2; alpha is 1 where the installed version ignores it
template <class T> struct SuperSpike {
  T alpha;
  SNN_HD explicit SuperSpike(const SnnSurrogate& s) : alpha(T(s.a)) {}
  SNN_HD T operator()(T x, T g) const {
    T y = alpha * std::fabs(x) + T(1);
    return g / (y * y);
  }
};
// norse threshold.py Triangle: alpha relu(1 - |x|)
template <class T> struct Triangle {
  T alpha;
  SNN_HD explicit Triangle(const SnnSurrogate& s) : alpha(T(s.a)) {}
  SNN_HD T operator()(T x, T g) const {
    T y = T(1) - std::fabs(x);
    return g * alpha * (y < T(0) ? T(0) : y);
  }
};
// norse threshold.py HeaviTanh: 1 - tanh(alpha x)^2
template <class T> struct Tanh {
  T alpha;
  SNN_HD explicit Tanh(const SnnSurrogate& s) : alpha(T(s.a)) {}
  SNN_HD T operator()(T x, T g) const {
    // |tanh|, which close to 1, where the difference to it is all that counts, rounds as the library's does.
    T e = exponential(T(-2) * std::fabs(x * alpha)), y = T(1) - T(2) * e / (T(1) + e);
    return g * (T(1) - y * y);
  }
};
// norse threshold.py HeaviCirc: 2 alpha (1 / (2 r) - x^2 / (2 r^3)), r = sqrt(alpha^2 + x^2)
template <class T> struct Circ {
  T alpha;
  SNN_HD explicit Circ(const SnnSurrogate& s) : alpha(T(s.a)) {}
  SNN_HD T operator()(T x, T g) const {
    T square = alpha * alpha + x * x, root = std::sqrt(square);
    return g * (-(x * x / (T(2) * (square * root))) + T(1) / (T(2) * root)) * T(2) * alpha;
  }
};
// norse threshold.py HeaviErfc: 2 exp(-(alpha x)^2) / sqrt(pi), the root rounded to float32 as there
template <class T> struct Erfc {
  T alpha;
  SNN_HD explicit Erfc(const SnnSurrogate& s) : alpha(T(s.a)) {}
  SNN_HD T operator()(T x, T g) const {
    T y = alpha * x;
    return T(2) * exponential(-(y * y)) / T(1.7724539041519165f) * g;
  }
};
// A formula that only Python knows: the derivative itself was evaluated before, and stands in the place of x.
template <class T> struct Given {
  SNN_HD T operator()(T derivative, T g) const { return g * derivative; }
};

// Calls visit(functor) with the functor that `s` names.
template <class T, class Visit> SNN_HD void visit_surrogate(const SnnSurrogate& s, Visit visit) {
  switch (s.kind) {
    case kAtan: return visit(Atan<T>(s));
    case kFastSigmoid: return visit(FastSigmoid<T>(s));
    case kSigmoid: return visit(Sigmoid<T>(s));
    case kStraightThrough: return visit(StraightThrough<T>());
    case kTriangular: return visit(Triangular<T>(s));
    case kStep: return visit(Step<T>());
    case kSpikeRateEscape: return visit(SpikeRateEscape<T>(s));
    case kSuperSpike: return visit(SuperSpike<T>(s));
    case kTriangle: return visit(Triangle<T>(s));
    case kTanh: return visit(Tanh<T>(s));
    case kCirc: return visit(Circ<T>(s));
    case kErfc: return visit(Erfc<T>(s));
    case kGiven: return visit(Given<T>());
    default: return visit(ZeroDerivative<T>());
  }
}

// A bound of the support as T. No comparison with NaN holds, so an infinite bound excludes nothing, not even infinity.
template <class T> SNN_HD T bound(double value) { return std::isinf(value) ? T(NAN) : T(value); }

// Written with negations so that a NaN membrane counts as inside and its NaN stays visible.
template <class T> SNN_HD bool inside(T x, T low, T high) { return !(x <= low) & !(x >= high); }

}  // namespace snn
