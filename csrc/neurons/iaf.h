// Norse IAF and IAFCell (norse/torch/functional/iaf.py): no leak. The reset is NOT detached.
#pragma once
#include "../abi.h"
#include "site.h"

namespace snn {

template <class Scalar> struct Iaf {
  using T = Scalar;
  static constexpr int States = 1, Count = 2, Traces = 0;
  static constexpr bool Spikes = true, Recurrent = false, InnerSpikeGradient = true;
  static constexpr bool AdjointUsesSpike = true, AdjointUsesReset = false, AdjointUsesTraces = false,
                        AdjointUsesBefore = false;
  struct Parameters {
    T threshold, reset;
    SNN_HD Parameters(const T* p, int) : threshold(p[0]), reset(p[1]) {}
  };

  SNN_HD static T after_reset(const Parameters& p, T u, T spike) { return (T(1) - spike) * u + spike * p.reset; }

  SNN_HD static Site<T> step(const Parameters& p, T x, T* state, T& output) {
    Site<T> s;
    s.u = state[0] + x;
    s.reset = T(0);
    s.spike = positive(s.u - p.threshold);
    output = s.spike;
    state[0] = after_reset(p, s.u, s.spike);
    return s;
  }

  SNN_HD static T distance(const Parameters& p, const Site<T>& s) { return s.u - p.threshold; }

  SNN_HD static void left(const Parameters& p, const Site<T>& s, T* state) { state[0] = after_reset(p, s.u, s.spike); }

  SNN_HD static T upstream(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& g) {
    return g.output + g.state[0] * (p.reset - s.u);
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters&, const Site<T>& s, const T*,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r;
    T lv = g.state[0];
    r.input = r.carry[0] = (T(1) - s.spike) * lv + phi;
    r.parameters[0] = -phi;
    r.parameters[1] = s.spike * lv;
    return r;
  }
};

}  // namespace snn
