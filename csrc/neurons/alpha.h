// snnTorch Alpha (snntorch/_neurons/alpha.py). The membrane follows from the two synaptic currents alone; its old value
// only decides about the reset. Reset by subtraction takes the threshold from the excitatory current.
#pragma once
#include "firing.h"

namespace snn {

template <class Scalar> struct Alpha : Firing<Scalar, kAnyReset, false> {
  using T = Scalar;
  using Fires = Firing<T, kAnyReset, false>;
  static constexpr int States = 3, Count = 5, Traces = 2;  // states mem, syn_exc, syn_inh; traced: the currents
  static constexpr bool Recurrent = false, AdjointUsesBefore = false;
  struct Parameters : Fires {
    T tau, alpha, beta;  // tau = log(alpha) / (log(beta) - log(alpha)) + 1; alpha and beta already clamped to [0, 1]
    SNN_HD Parameters(const T* p, int reset) : Fires{p[1], p[2], reset}, tau(p[0]), alpha(p[3]), beta(p[4]) {}
  };

  SNN_HD static Site<T> step(const Parameters& p, T x, T* state, T& output) {
    Site<T> s;
    s.reset = positive(state[0] - p.threshold);
    T exc = p.alpha * state[1] + x, inh = p.beta * state[2] - x, v = p.tau * (exc + inh);
    if (p.subtracts()) {
      exc = exc - p.threshold * s.reset;
      inh = inh - inh * s.reset;
      v = v - (-state[2]) * s.reset;
    }
    if (p.zeroes()) {
      exc = exc - exc * s.reset;
      inh = inh - inh * s.reset;
      v = v - v * s.reset;
    }
    s.u = v;
    s.trace[0] = exc;
    s.trace[1] = inh;
    s.spike = positive(v - p.threshold);
    output = s.spike * p.gamma;
    state[0] = v;
    state[1] = exc;
    state[2] = inh;
    return s;
  }

  SNN_HD static void left(const Parameters&, const Site<T>& s, T* state) {
    state[0] = s.u;
    state[1] = s.trace[0];
    state[2] = s.trace[1];
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r{};
    const typename Fires::Adjoint of = p.Fires::adjoint(s, g.output, g.state[0], phi);
    T kept = T(1) - s.reset, mem = of.u, exc = g.state[1], inh = g.state[2];
    T of_threshold = of.threshold, of_old_inh = T(0);
    if (p.subtracts()) {
      of_threshold = of_threshold - s.reset * exc;
      of_old_inh = s.reset * mem;
      inh = kept * inh;
    }
    if (p.zeroes()) {
      mem = kept * mem;
      exc = kept * exc;
      inh = kept * inh;
    }
    // The input is in both currents, with opposite signs: it is not in their sum.
    r.parameters[0] = mem * (p.alpha * before[1] + p.beta * before[2]);
    exc = exc + p.tau * mem;
    inh = inh + p.tau * mem;
    r.input = exc - inh;
    r.carry[0] = T(0);
    r.carry[1] = p.alpha * exc;
    r.carry[2] = p.beta * inh + of_old_inh;
    r.parameters[1] = of_threshold;
    r.parameters[2] = of.gamma;
    r.parameters[3] = exc * before[1];
    r.parameters[4] = inh * before[2];
    return r;
  }
};

}  // namespace snn
