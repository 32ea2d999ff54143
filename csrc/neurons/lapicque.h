// snnTorch Lapicque (snntorch/_neurons/lapicque.py). A reset to zero takes away the whole update.
#pragma once
#include "firing.h"

namespace snn {

template <class Scalar> struct Lapicque : Firing<Scalar, kAnyReset, false> {
  using T = Scalar;
  using Fires = Firing<T, kAnyReset, false>;
  static constexpr int States = 1, Count = 6, Traces = 0;
  static constexpr bool Recurrent = false, AdjointUsesBefore = false;
  struct Parameters : Fires {
    T decay, resistance, inverse, time_step;  // decay = 1 - time_step / RC, inverse = 1 / RC; no gradients of these
    SNN_HD Parameters(const T* p, int reset)
        : Fires{p[1], p[2], reset}, decay(p[0]), resistance(p[3]), inverse(p[4]), time_step(p[5]) {}
  };

  SNN_HD static Site<T> step(const Parameters& p, T x, T* state, T& output) {
    Site<T> s;
    s.reset = positive(state[0] - p.threshold);
    T v = x * p.resistance * p.inverse * p.time_step + p.decay * state[0];
    if (p.subtracts()) v = v - s.reset * p.threshold;
    if (p.zeroes()) v = v - s.reset * v;
    s.u = v;
    s.spike = positive(v - p.threshold);
    output = s.spike * p.gamma;
    state[0] = v;
    return s;
  }

  SNN_HD static void left(const Parameters&, const Site<T>& s, T* state) { state[0] = s.u; }

  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T*,
                                                    const Cotangents<T, States>& g, T phi) {
    Gradients<T, States, Count> r{};
    const typename Fires::Adjoint of = p.Fires::adjoint(s, g.output, g.state[0], phi);
    T updated = p.zeroes() ? (T(1) - s.reset) * of.u : of.u;
    r.input = updated * p.time_step * p.inverse * p.resistance;
    r.carry[0] = p.decay * updated;
    r.parameters[1] = p.subtracts() ? of.threshold - s.reset * of.u : of.threshold;
    r.parameters[2] = of.gamma;
    return r;
  }
};

}  // namespace snn
