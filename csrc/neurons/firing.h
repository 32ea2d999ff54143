// What snnTorch's neurons have in common (snntorch/_neurons/neurons.py, fire() and mem_reset()): the reset decision is
// taken from the membrane as it enters the step, and is detached; spikes are multiplied by a graded factor gamma. With
// a late reset (reset_delay=False) the membrane is corrected after firing, and that is not detached.
#pragma once
#include "../abi.h"
#include "site.h"

namespace snn {

constexpr int kAnyReset = -1;  // a neuron that asks at run time: one compiled struct instead of three

template <class T, int Reset, bool Late> struct Firing {
  static constexpr bool Spikes = true, InnerSpikeGradient = Late && Reset != kNone;
  static constexpr bool AdjointUsesSpike = InnerSpikeGradient;
  static constexpr bool AdjointUsesReset = InnerSpikeGradient || Reset == kZero || Reset == kAnyReset;
  static constexpr bool AdjointUsesTraces = false;

  T threshold, gamma;
  int reset;

  SNN_HD bool subtracts() const { return (Reset == kAnyReset ? reset : Reset) == kSubtract; }
  SNN_HD bool zeroes() const { return (Reset == kAnyReset ? reset : Reset) == kZero; }

  // The membrane that a step leaves behind.
  SNN_HD T corrected(T v, T spike, T reset) const {
    if (!InnerSpikeGradient) return v;
    T d = (spike * gamma) / gamma - reset;
    return subtracts() ? v - d * threshold : v - d * v;
  }

  // Gradient of the spike through the correction, or 0.
  SNN_HD T correction(const Site<T>& s, T carried) const {
    if (!InnerSpikeGradient) return T(0);
    return -(subtracts() ? threshold : s.u) * carried;
  }

  // As site.h wants them; p: the parameters of the neuron, which has these rules.
  SNN_HD static T distance(const Firing& p, const Site<T>& s) { return s.u - p.threshold; }
  template <int States> SNN_HD static T upstream(const Firing& p, const Site<T>& s, const Cotangents<T, States>& g) {
    T total = g.output;
    if (InnerSpikeGradient) total = total + p.correction(s, g.state[0]) / p.gamma;
    return total * p.gamma;
  }

  // Gradients of the membrane at the comparison, of the threshold (but for a reset in this step) and of gamma.
  struct Adjoint {
    T u, threshold, gamma;
  };
  SNN_HD Adjoint adjoint(const Site<T>& s, T output, T carried, T phi) const {
    T a = carried;
    T d = InnerSpikeGradient ? (s.spike * gamma) / gamma - s.reset : T(0);
    if (InnerSpikeGradient && zeroes()) a = (T(1) - d) * carried;
    a = a + phi;
    // The correction divides the output by gamma again: its two parts cancel, but not if they are NaN.
    T inner = correction(s, carried) / gamma;
    T of_gamma = InnerSpikeGradient ? s.spike * (output + inner) - inner * s.spike : s.spike * output;
    return {a, -phi - (InnerSpikeGradient && subtracts() ? d * carried : T(0)), of_gamma};
  }
};

}  // namespace snn
