// Norse LIFBoxCell (norse/torch/functional/lif_box.py) and LIBoxCell (leaky_integrator_box.py): the input drives the
// membrane without a synaptic current. The reset is NOT detached.
#pragma once
#include "../abi.h"
#include "site.h"

namespace snn {

// Reset to the reset potential (kValue), or by the threshold (kSubtract).
template <class Scalar> struct LifBox {
  using T = Scalar;
  static constexpr int States = 1, Count = 4, Traces = 1;  // traced: the input
  static constexpr bool Spikes = true, Recurrent = false, InnerSpikeGradient = true;
  static constexpr bool AdjointUsesSpike = true, AdjointUsesReset = false, AdjointUsesTraces = false,
                        AdjointUsesBefore = false;
  struct Parameters {
    T mem, leak, threshold, reset;  // mem = dt tau_mem_inv
    bool to_value;
    SNN_HD Parameters(const T* p, int kind)
        : mem(p[0]), leak(p[1]), threshold(p[2]), reset(p[3]), to_value(kind == kValue) {}
  };

  SNN_HD static T after_reset(const Parameters& p, T u, T spike) {
    return (T(1) - spike) * u + spike * (p.to_value ? p.reset : u - p.threshold);
  }

  SNN_HD static Site<T> step(const Parameters& p, T x, T* state, T& output) {
    Site<T> s;
    T u = state[0] + p.mem * ((x + p.leak) - state[0]);
    s.u = u;
    s.trace[0] = x;
    s.reset = T(0);
    s.spike = positive(u - p.threshold);
    output = s.spike;
    state[0] = after_reset(p, u, s.spike);
    return s;
  }

  SNN_HD static T distance(const Parameters& p, const Site<T>& s) { return s.u - p.threshold; }

  SNN_HD static void left(const Parameters& p, const Site<T>& s, T* state) { state[0] = after_reset(p, s.u, s.spike); }

  SNN_HD static T upstream(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& g) {
    // By subtraction u cancels, but not if it is infinite.
    T lv = g.state[0], by_threshold = lv * (s.u - p.threshold) - lv * s.u;
    return g.output + (p.to_value ? lv * (p.reset - s.u) : by_threshold);
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r{};
    T lv = g.state[0];
    T lu = (p.to_value ? (T(1) - s.spike) * lv : lv) + phi;
    r.input = p.mem * lu;
    r.carry[0] = lu - p.mem * lu;
    r.parameters[0] = lu * ((s.trace[0] + p.leak) - before[0]);
    r.parameters[1] = p.mem * lu;
    r.parameters[2] = p.to_value ? -phi : -(phi + s.spike * lv);
    if (p.to_value) r.parameters[3] = s.spike * lv;
    return r;
  }
};

template <class Scalar> struct LiBox {
  using T = Scalar;
  static constexpr int States = 1, Count = 2, Traces = 1;  // traced: the input
  static constexpr bool Spikes = false, Recurrent = false, InnerSpikeGradient = false;
  static constexpr bool AdjointUsesSpike = false, AdjointUsesReset = false, AdjointUsesTraces = false,
                        AdjointUsesBefore = false;
  struct Parameters {
    T mem, leak;  // mem = dt tau_mem_inv
    SNN_HD Parameters(const T* p, int) : mem(p[0]), leak(p[1]) {}
  };

  SNN_HD static Site<T> step(const Parameters& p, T x, T* state, T& output) {
    Site<T> s;
    T v = state[0] + p.mem * ((p.leak - state[0]) + x);
    s.u = v;
    s.trace[0] = x;
    s.spike = s.reset = T(0);
    output = state[0] = v;
    return s;
  }

  SNN_HD static T distance(const Parameters&, const Site<T>& s) { return s.u; }

  SNN_HD static void left(const Parameters&, const Site<T>& s, T* state) { state[0] = s.u; }

  SNN_HD static T upstream(const Parameters&, const Site<T>&, const Cotangents<T, States>&) { return T(0); }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T) {
    Gradients<T, States, Count> r;
    T lv = g.output + g.state[0];
    r.input = p.mem * lv;
    r.carry[0] = lv - p.mem * lv;
    r.parameters[0] = lv * ((p.leak - before[0]) + s.trace[0]);
    r.parameters[1] = p.mem * lv;
    return r;
  }
};

}  // namespace snn
