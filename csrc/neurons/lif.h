// Norse LIF and LIFCell (norse/torch/functional/lif.py, lif_feed_forward_step of 1.1.0), whose reset is NOT detached; and
// LIFRecurrent and LIFRecurrentCell (lif_step), whose reset is.
#pragma once
#include "../abi.h"
#include "site.h"

namespace snn {

template <class Scalar, bool IsRecurrent> struct Lif {
  using T = Scalar;
  static constexpr int States = 2, Count = 5, Traces = 1;  // traced: the synaptic current
  static constexpr bool Spikes = true, Recurrent = IsRecurrent, InnerSpikeGradient = !Recurrent;
  static constexpr bool AdjointUsesSpike = true, AdjointUsesReset = false, AdjointUsesTraces = false,
                        AdjointUsesBefore = false;
  struct Parameters {
    T mem, syn, leak, threshold, reset;  // mem = dt tau_mem_inv, syn = -dt tau_syn_inv
    SNN_HD Parameters(const T* p, int) : mem(p[0]), syn(p[1]), leak(p[2]), threshold(p[3]), reset(p[4]) {}
  };

  SNN_HD static T after_reset(const Parameters& p, T u, T spike) { return (T(1) - spike) * u + spike * p.reset; }

  template <class Input> SNN_HD static Site<T> step(const Parameters& p, const Input& x, T* state, T& output) {
    Site<T> s;
    T c = state[1] + x;
    T u = state[0] + p.mem * ((p.leak - state[0]) + c);
    s.u = u;
    s.trace[0] = c;
    s.reset = T(0);
    s.spike = positive(u - p.threshold);
    state[0] = after_reset(p, u, s.spike);
    state[1] = c + p.syn * c;
    output = s.spike;
    return s;
  }

  SNN_HD static T distance(const Parameters& p, const Site<T>& s) { return s.u - p.threshold; }

  // The current decays once more, but no gradient asks for it.
  SNN_HD static void left(const Parameters& p, const Site<T>& s, T* state) {
    state[0] = after_reset(p, s.u, s.spike);
    state[1] = T(0);
  }

  SNN_HD static T upstream(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& g) {
    return Recurrent ? g.output : g.output + g.state[0] * (p.reset - s.u);
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r;
    T lv = g.state[0], li = g.state[1];
    T lu = (T(1) - s.spike) * lv + phi;
    T lc = p.mem * lu + (li + p.syn * li);
    r.input = lc;
    r.carry[0] = lu - p.mem * lu;
    r.carry[1] = lc;
    r.parameters[0] = lu * ((p.leak - before[0]) + s.trace[0]);
    r.parameters[1] = li * s.trace[0];
    r.parameters[2] = p.mem * lu;
    r.parameters[3] = -phi;
    r.parameters[4] = s.spike * lv;
    return r;
  }
};

}  // namespace snn
