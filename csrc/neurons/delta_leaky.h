// snnTorch DeltaLeaky (snntorch/_neurons/deltaleaky.py): fires where the membrane moves by more than a threshold, and
// never resets. What is compared, u, is the movement.
#pragma once
#include "../abi.h"
#include "site.h"

namespace snn {

template <class Scalar> struct DeltaLeaky {
  using T = Scalar;
  static constexpr int States = 1, Count = 2, Traces = 1;  // traced: the membrane
  static constexpr bool Spikes = true, Recurrent = false, InnerSpikeGradient = false;
  static constexpr bool AdjointUsesSpike = false, AdjointUsesReset = false, AdjointUsesTraces = false,
                        AdjointUsesBefore = false;
  struct Parameters {
    T beta, threshold;
    SNN_HD Parameters(const T* p, int) : beta(p[0]), threshold(p[1]) {}
  };

  SNN_HD static T sign(T u) { return positive(u) - positive(-u); }

  SNN_HD static Site<T> step(const Parameters& p, T x, T* state, T& output) {
    Site<T> s;
    T v = p.beta * state[0] + x;
    s.u = v - state[0];
    s.trace[0] = v;
    s.reset = T(0);
    s.spike = positive(distance(p, s));
    output = s.spike;
    state[0] = v;
    return s;
  }

  SNN_HD static T distance(const Parameters& p, const Site<T>& s) { return sign(s.u) * s.u - p.threshold; }

  SNN_HD static void left(const Parameters&, const Site<T>& s, T* state) { state[0] = s.trace[0]; }

  // Of the movement's size; its sign makes that of the movement of it.
  SNN_HD static T upstream(const Parameters&, const Site<T>& s, const Cotangents<T, States>& g) {
    return g.output * sign(s.u);
  }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>&, const T* before,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r;
    T moved = g.state[0] + phi;
    r.input = moved;
    r.carry[0] = p.beta * moved - phi;
    r.parameters[0] = moved * before[0];
    r.parameters[1] = T(0);
    return r;
  }
};

}  // namespace snn
