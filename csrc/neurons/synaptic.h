// snnTorch Synaptic (snntorch/_neurons/synaptic.py) and RSynaptic (rsynaptic.py). A reset to zero takes away the whole update of the membrane and
// leaves the synaptic current alone.
#pragma once
#include "firing.h"

namespace snn {

template <class Scalar, bool Late, bool IsRecurrent> struct Synaptic : Firing<Scalar, kAnyReset, Late> {
  using T = Scalar;
  using Fires = Firing<T, kAnyReset, Late>;
  static constexpr int States = 2, Count = 4, Traces = 1;  // states mem, syn; traced: syn
  static constexpr bool Recurrent = IsRecurrent, AdjointUsesBefore = false;
  struct Parameters : Fires {
    T beta, alpha;  // already clamped to [0, 1]
    SNN_HD Parameters(const T* p, int reset) : Fires{p[1], p[2], reset}, beta(p[0]), alpha(p[3]) {}
  };

  template <class Input> SNN_HD static Site<T> step(const Parameters& p, const Input& x, T* state, T& output) {
    Site<T> s;
    s.reset = positive(state[0] - p.threshold);
    T syn = p.alpha * state[1] + x;
    T v = p.beta * state[0] + syn;
    if (p.subtracts()) v = v - s.reset * p.threshold;
    if (p.zeroes()) v = v - v * s.reset;
    s.u = v;
    s.trace[0] = syn;
    s.spike = positive(v - p.threshold);
    output = s.spike * p.gamma;
    state[0] = p.corrected(v, s.spike, s.reset);
    state[1] = syn;
    return s;
  }

  SNN_HD static void left(const Parameters& p, const Site<T>& s, T* state) {
    state[0] = p.corrected(s.u, s.spike, s.reset);
    state[1] = s.trace[0];
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r;
    const typename Fires::Adjoint of = p.Fires::adjoint(s, g.output, g.state[0], phi);
    T updated = p.zeroes() ? (T(1) - s.reset) * of.u : of.u, syn = g.state[1] + updated;
    r.input = syn;
    r.carry[0] = p.beta * updated;
    r.carry[1] = p.alpha * syn;
    r.parameters[0] = updated * before[0];
    r.parameters[1] = p.subtracts() ? of.threshold - s.reset * of.u : of.threshold;
    r.parameters[2] = of.gamma;
    r.parameters[3] = syn * before[1];
    return r;
  }
};

}  // namespace snn
