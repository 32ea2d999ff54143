// snnTorch Leaky (snntorch/_neurons/leaky.py). Reset to zero takes away the old membrane, not the input.
#pragma once
#include "firing.h"

namespace snn {

template <class Scalar, int Reset, bool Late> struct Leaky : Firing<Scalar, Reset, Late> {
  using T = Scalar;
  using Fires = Firing<T, Reset, Late>;
  static constexpr int States = 1, Count = 3, Traces = 0;
  static constexpr bool Recurrent = false, AdjointUsesBefore = false;
  struct Parameters : Fires {
    T beta;  // already clamped to [0, 1]
    SNN_HD Parameters(const T* p, int reset) : Fires{p[1], p[2], reset}, beta(p[0]) {}
  };

  SNN_HD static Site<T> step(const Parameters& p, T x, T* state, T& output) {
    Site<T> s;
    T u = state[0];
    s.reset = positive(u - p.threshold);
    if (p.zeroes()) u = (T(1) - s.reset) * u;
    T v = p.beta * u + x;
    if (p.subtracts()) v = v - s.reset * p.threshold;
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
    T kept = p.zeroes() ? T(1) - s.reset : T(1);
    r.input = of.u;
    r.carry[0] = p.beta * (kept * of.u);
    r.parameters[0] = of.u * (kept * before[0]);
    r.parameters[1] = p.subtracts() ? of.threshold - s.reset * of.u : of.threshold;
    r.parameters[2] = of.gamma;
    return r;
  }
};

}  // namespace snn
