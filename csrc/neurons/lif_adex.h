// Norse LIFAdEx and LIFAdExCell (norse/torch/functional/lif_adex.py), and their recurrent forms: LIFEx with a current
// `a` that the membrane and the spikes feed, and that works against them. Nothing is detached in any of them.
#pragma once
#include "lif_ex.h"

namespace snn {

template <class Scalar, bool IsRecurrent> struct LifAdex {
  using T = Scalar;
  static constexpr int States = 3, Count = 9, Traces = 3;  // states v, i, a; traced: i, the exponential, old a
  static constexpr int GivenTrace = 1;
  static constexpr bool Spikes = true, Recurrent = IsRecurrent, InnerSpikeGradient = true;
  static constexpr bool AdjointUsesSpike = true, AdjointUsesReset = false, AdjointUsesTraces = true,
                        AdjointUsesBefore = false;
  struct Parameters : Exponential<T> {
    T ada, coupling, jump;  // ada = dt tau_ada_inv; of the membrane, and of a spike
    SNN_HD Parameters(const T* p, int) : Exponential<T>(p), ada(p[6]), coupling(p[7]), jump(p[8]) {}
  };

  template <class Input>
  SNN_HD static Site<T> step(const Parameters& p, const Input& x, T exponential, T* state, T& output) {
    Site<T> s;
    T v = state[0], a = state[2], c = state[1] + x;
    s.u = v + p.mem * (p.drive(v, exponential, c) - a);
    T decayed = a + p.ada * (p.coupling * (v - p.leak) - a);
    s.trace[0] = c;
    s.trace[1] = exponential;
    s.trace[2] = a;
    s.reset = T(0);
    s.spike = output = positive(s.u - p.threshold);
    state[0] = p.after_reset(s.u, s.spike);
    state[1] = c + p.syn * c;
    state[2] = decayed + s.spike * p.jump;
    return s;
  }

  SNN_HD static T distance(const Parameters& p, const Site<T>& s) { return s.u - p.threshold; }

  // Current and adaptation are not among the traces of this step, but of the next.
  SNN_HD static void left(const Parameters& p, const Site<T>& s, T* state) {
    state[0] = p.after_reset(s.u, s.spike);
    state[1] = state[2] = T(0);
  }

  SNN_HD static T upstream(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& g) {
    return g.output + g.state[0] * (p.reset - s.u) + g.state[2] * p.jump;
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T* before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r;
    T lv = g.state[0], li = g.state[1], la = g.state[2], v = before[0], e = s.trace[1], a = s.trace[2];
    T lu = (T(1) - s.spike) * lv + phi, lm = p.mem * lu, lh = p.ada * la;
    r.input = r.carry[1] = lm + (li + p.syn * li);
    r.carry[0] = p.of_membrane(lu, e) + lh * p.coupling;
    r.carry[2] = (la - lh) - lm;
    r.parameters[0] = lu * (p.drive(v, e, s.trace[0]) - a);
    r.parameters[1] = li * s.trace[0];
    r.parameters[2] = lm - lh * p.coupling;
    r.parameters[3] = p.of_threshold(lu, e, phi);
    r.parameters[4] = s.spike * lv;
    r.parameters[5] = p.of_sharpness(lu, e, v);
    r.parameters[6] = la * (p.coupling * (v - p.leak) - a);
    r.parameters[7] = lh * (v - p.leak);
    r.parameters[8] = s.spike * la;
    return r;
  }
};

}  // namespace snn
