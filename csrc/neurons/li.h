// Norse LI and LICell (norse/torch/functional/leaky_integrator.py): the output is the membrane itself.
#pragma once
#include "../abi.h"
#include "site.h"

namespace snn {

template <class Scalar> struct Li {
  using T = Scalar;
  static constexpr int States = 2, Count = 3, Traces = 1;  // traced: the synaptic current
  static constexpr bool Spikes = false, Recurrent = false, InnerSpikeGradient = false;
  static constexpr bool AdjointUsesSpike = false, AdjointUsesReset = false, AdjointUsesTraces = false,
                        AdjointUsesBefore = false;
  struct Parameters {
    T mem, syn, leak;  // mem = dt tau_mem_inv, syn = -dt tau_syn_inv
    SNN_HD Parameters(const T* p, int) : mem(p[0]), syn(p[1]), leak(p[2]) {}
  };

  SNN_HD static Site<T> step(const Parameters& p, T x, T* state, T& output) {
    Site<T> s;
    T c = state[1] + x;
    T v = state[0] + p.mem * ((p.leak - state[0]) + c);
    s.u = v;
    s.trace[0] = c;
    s.spike = s.reset = T(0);
    state[0] = v;
    state[1] = c + p.syn * c;
    output = v;
    return s;
  }

  SNN_HD static T distance(const Parameters&, const Site<T>& s) { return s.u; }

  // The current decays once more, but no gradient asks for it.
  SNN_HD static void left(const Parameters&, const Site<T>& s, T* state) {
    state[0] = s.u;
    state[1] = T(0);
  }

  SNN_HD static T upstream(const Parameters&, const Site<T>&, const Cotangents<T, States>&) { return T(0); }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T) {
    Gradients<T, States, Count> r;
    T lv = g.output + g.state[0], li = g.state[1];
    T lc = p.mem * lv + (li + p.syn * li);
    r.input = lc;
    r.carry[0] = lv - p.mem * lv;
    r.carry[1] = lc;
    r.parameters[0] = lv * ((p.leak - before[0]) + s.trace[0]);
    r.parameters[1] = li * s.trace[0];
    r.parameters[2] = p.mem * lv;
    return r;
  }
};

}  // namespace snn
