// snnTorch RLeaky (snntorch/_neurons/rleaky.py). A reset to zero takes away the whole update, unlike Leaky's.
#pragma once
#include "firing.h"

namespace snn {

template <class Scalar, bool Late> struct RLeaky : Firing<Scalar, kAnyReset, Late> {
  using T = Scalar;
  using Fires = Firing<T, kAnyReset, Late>;
  static constexpr int States = 1, Count = 3, Traces = 0;
  static constexpr bool Recurrent = true, AdjointUsesBefore = false;
  struct Parameters : Fires {
    T beta;  // already clamped to [0, 1]
    SNN_HD Parameters(const T* p, int reset) : Fires{p[1], p[2], reset}, beta(p[0]) {}
  };

  SNN_HD static Site<T> step(const Parameters& p, const Drive<T>& x, T* state, T& output) {
    Site<T> s;
    s.reset = positive(state[0] - p.threshold);
    T v = p.beta * state[0] + x;
    if (p.subtracts()) v = v - s.reset * p.threshold;
    if (p.zeroes()) v = v - s.reset * v;
    s.u = v;
    s.spike = positive(v - p.threshold);
    output = s.spike * p.gamma;
    state[0] = p.corrected(v, s.spike, s.reset);
    return s;
  }

  SNN_HD static void left(const Parameters& p, const Site<T>& s, T* state) {
    state[0] = p.corrected(s.u, s.spike, s.reset);
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r;
    const typename Fires::Adjoint of = p.Fires::adjoint(s, g.output, g.state[0], phi);
    T updated = p.zeroes() ? (T(1) - s.reset) * of.u : of.u;
    r.input = updated;
    r.carry[0] = p.beta * updated;
    r.parameters[0] = updated * before[0];
    r.parameters[1] = p.subtracts() ? of.threshold - s.reset * of.u : of.threshold;
    r.parameters[2] = of.gamma;
    return r;
  }
};

}  // namespace snn
