// Norse LSNN and LSNNCell (norse/torch/functional/lsnn.py): the threshold b adapts, and the membrane is driven by the
// synaptic current of the step before. Neither reset nor adaptation is detached, but in LSNNRecurrent and
// LSNNRecurrentCell both are.
#pragma once
#include "../abi.h"
#include "site.h"

namespace snn {

template <class Scalar, bool IsRecurrent> struct Lsnn {
  using T = Scalar;
  static constexpr int States = 3, Count = 7, Traces = 2;  // states v, i, b; traced: decayed b, old i
  static constexpr bool Spikes = true, Recurrent = IsRecurrent, InnerSpikeGradient = !Recurrent;
  static constexpr bool AdjointUsesSpike = true, AdjointUsesReset = false, AdjointUsesTraces = true,
                        AdjointUsesBefore = false;
  struct Parameters {
    T mem, syn, leak, adapt, threshold, reset, beta;  // mem = dt tau_mem_inv, syn = -dt tau_syn_inv, adapt alike
    SNN_HD Parameters(const T* p, int)
        : mem(p[0]), syn(p[1]), leak(p[2]), adapt(p[3]), threshold(p[4]), reset(p[5]), beta(p[6]) {}
  };

  SNN_HD static T after_reset(const Parameters& p, T u, T spike) { return (T(1) - spike) * u + spike * p.reset; }

  template <class Input> SNN_HD static Site<T> step(const Parameters& p, const Input& x, T* state, T& output) {
    Site<T> s;
    T u = state[0] + p.mem * ((p.leak - state[0]) + state[1]);
    T i = state[1] + p.syn * state[1];
    T b = state[2] + p.adapt * (p.threshold - state[2]);
    s.u = u;
    s.trace[0] = b;
    s.trace[1] = state[1];
    s.reset = T(0);
    s.spike = positive(u - b);
    output = s.spike;
    state[0] = after_reset(p, u, s.spike);
    state[1] = i + x;
    state[2] = b + s.spike * p.beta;
    return s;
  }

  SNN_HD static T distance(const Parameters&, const Site<T>& s) { return s.u - s.trace[0]; }

  // The current is not among the traces of this step, but of the next.
  SNN_HD static void left(const Parameters& p, const Site<T>& s, T* state) {
    state[0] = after_reset(p, s.u, s.spike);
    state[1] = T(0);
    state[2] = s.trace[0] + s.spike * p.beta;
  }

  SNN_HD static T upstream(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& g) {
    return Recurrent ? g.output : g.output + g.state[0] * (p.reset - s.u) + g.state[2] * p.beta;
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r;
    T lv = g.state[0], li = g.state[1], lb = g.state[2];
    T lu = (T(1) - s.spike) * lv + phi, decayed = lb - phi;
    r.input = li;
    r.carry[0] = lu - p.mem * lu;
    r.carry[1] = p.mem * lu + (li + p.syn * li);
    r.carry[2] = decayed - p.adapt * decayed;
    r.parameters[0] = lu * ((p.leak - before[0]) + s.trace[1]);
    r.parameters[1] = li * s.trace[1];
    r.parameters[2] = p.mem * lu;
    r.parameters[3] = decayed * (p.threshold - before[2]);
    r.parameters[4] = p.adapt * decayed;
    r.parameters[5] = s.spike * lv;
    r.parameters[6] = s.spike * lb;
    return r;
  }
};

}  // namespace snn
