// snnTorch Leaky (snntorch/_neurons/leaky.py). The reset decision is detached; with a late reset
// (reset_delay=False) the correction after firing is not.
#pragma once
#include "../abi.h"
#include "site.h"

namespace snn {

template <class Scalar, int Reset, bool Late> struct Leaky {
  using T = Scalar;
  static constexpr int States = 1, Count = 3;
  static constexpr bool Spikes = true, InnerSpikeGradient = Late && Reset != kNone, HasCurrent = false;
  static constexpr bool AdjointUsesSpike = InnerSpikeGradient, AdjointUsesReset = InnerSpikeGradient || Reset == kZero;
  struct Parameters {
    T beta, threshold, gamma;  // beta already clamped to [0, 1]; gamma: graded spikes factor
    SNN_HD explicit Parameters(const T* p) : beta(p[0]), threshold(p[1]), gamma(p[2]) {}
  };

  SNN_HD static T late_reset(const Parameters& p, T v, T spike, T reset) {
    if (!Late || Reset == kNone) return v;
    T d = (spike * p.gamma) / p.gamma - reset;
    return Reset == kSubtract ? v - d * p.threshold : v - d * v;
  }

  SNN_HD static Site<T> step(const Parameters& p, T x, T* state, T& output) {
    Site<T> s;
    T u = state[0];
    s.reset = positive(u - p.threshold);
    if (Reset == kZero) u = (T(1) - s.reset) * u;
    T v = p.beta * u + x;
    if (Reset == kSubtract) v = v - s.reset * p.threshold;
    s.u = v;
    s.current = T(0);
    s.spike = positive(v - p.threshold);
    output = s.spike * p.gamma;
    state[0] = late_reset(p, v, s.spike, s.reset);
    return s;
  }

  SNN_HD static T left(const Parameters& p, const Site<T>& s) { return late_reset(p, s.u, s.spike, s.reset); }

  // Gradient of the spike through the late correction, or 0.
  SNN_HD static T correction(const Parameters& p, const Site<T>& s, T carried) {
    if (!InnerSpikeGradient) return T(0);
    return -(Reset == kSubtract ? p.threshold : s.u) * carried;
  }

  SNN_HD static T upstream(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& g) {
    T total = g.output;
    if (InnerSpikeGradient) total = total + correction(p, s, g.state[0]) / p.gamma;
    return total * p.gamma;
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, T before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r;
    T carried = g.state[0], a = carried;
    T d = InnerSpikeGradient ? (s.spike * p.gamma) / p.gamma - s.reset : T(0);
    if (InnerSpikeGradient && Reset == kZero) a = (T(1) - d) * carried;
    a = a + phi;
    T kept = Reset == kZero ? T(1) - s.reset : T(1);
    r.input = a;
    r.carry[0] = p.beta * (kept * a);
    r.parameters[0] = a * (kept * before);
    r.parameters[1] = -phi - (Reset == kSubtract ? s.reset * a + d * carried : T(0));
    // The late correction divides the output by gamma again: its two parts cancel, but not if they are NaN.
    T inner = correction(p, s, carried) / p.gamma;
    r.parameters[2] = InnerSpikeGradient ? s.spike * (g.output + inner) - inner * s.spike : s.spike * g.output;
    return r;
  }
};

}  // namespace snn
