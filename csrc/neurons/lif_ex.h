// Norse LIFEx and LIFExCell (norse/torch/functional/lif_ex.py), and their recurrent forms: the membrane is driven by an
// exponential of itself, too. The reset is NOT detached in any of them.
#pragma once
#include "../abi.h"
#include "site.h"

namespace snn {

// What LIFEx and LIFAdEx have in common. The exponential e = exp((v - threshold) / sharpness) comes from outside, as it
// has to be the host's to the last bit.
template <class T> struct Exponential {
  T mem, syn, leak, threshold, reset, sharpness;  // mem = dt tau_mem_inv, syn = -dt tau_syn_inv
  SNN_HD explicit Exponential(const T* p)
      : mem(p[0]), syn(p[1]), leak(p[2]), threshold(p[3]), reset(p[4]), sharpness(p[5]) {}

  SNN_HD T drive(T v, T e, T current) const { return ((leak - v) + sharpness * e) + current; }
  SNN_HD T after_reset(T u, T spike) const { return (T(1) - spike) * u + spike * reset; }

  // Gradients of the membrane before the step and of parameters, from `lu`, that of u.
  SNN_HD T of_membrane(T lu, T e) const { return lu + mem * lu * (e - T(1)); }
  SNN_HD T of_threshold(T lu, T e, T phi) const { return -phi - mem * lu * e; }
  SNN_HD T of_sharpness(T lu, T e, T v) const { return mem * lu * (e - e * ((v - threshold) / sharpness)); }
};

template <class Scalar, bool IsRecurrent> struct LifEx {
  using T = Scalar;
  static constexpr int States = 2, Count = 6, Traces = 2;  // traced: the synaptic current, the exponential
  static constexpr int GivenTrace = 1;
  static constexpr bool Spikes = true, Recurrent = IsRecurrent, InnerSpikeGradient = true;
  static constexpr bool AdjointUsesSpike = true, AdjointUsesReset = false, AdjointUsesTraces = true,
                        AdjointUsesBefore = false;
  struct Parameters : Exponential<T> {
    SNN_HD Parameters(const T* p, int) : Exponential<T>(p) {}
  };

  template <class Input>
  SNN_HD static Site<T> step(const Parameters& p, const Input& x, T exponential, T* state, T& output) {
    Site<T> s;
    T c = state[1] + x;
    s.u = state[0] + p.mem * p.drive(state[0], exponential, c);
    s.trace[0] = c;
    s.trace[1] = exponential;
    s.reset = T(0);
    s.spike = output = positive(s.u - p.threshold);
    state[0] = p.after_reset(s.u, s.spike);
    state[1] = c + p.syn * c;
    return s;
  }

  SNN_HD static T distance(const Parameters& p, const Site<T>& s) { return s.u - p.threshold; }

  // The current decays once more, but no gradient asks for it.
  SNN_HD static void left(const Parameters& p, const Site<T>& s, T* state) {
    state[0] = p.after_reset(s.u, s.spike);
    state[1] = T(0);
  }

  SNN_HD static T upstream(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& g) {
    return g.output + g.state[0] * (p.reset - s.u);
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r;
    T lv = g.state[0], li = g.state[1], e = s.trace[1];
    T lu = (T(1) - s.spike) * lv + phi;
    r.input = r.carry[1] = p.mem * lu + (li + p.syn * li);
    r.carry[0] = p.of_membrane(lu, e);
    r.parameters[0] = lu * p.drive(before[0], e, s.trace[0]);
    r.parameters[1] = li * s.trace[0];
    r.parameters[2] = p.mem * lu;
    r.parameters[3] = p.of_threshold(lu, e, phi);
    r.parameters[4] = s.spike * lv;
    r.parameters[5] = p.of_sharpness(lu, e, before[0]);
    return r;
  }
};

}  // namespace snn
