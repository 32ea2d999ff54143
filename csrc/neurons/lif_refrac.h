// Norse LIFRefracCell, and LIFRefracRecurrent and LIFRefracRecurrentCell (norse/torch/functional/lif_refrac.py): a LIF
// step whose spike and membrane are masked while a counter, rho, has not come down to zero since the last spike. The
// mask is a threshold of rho with a surrogate derivative of its own, and unlike a recurrent LIF's reset not detached.
#pragma once
#include "../abi.h"
#include "lif.h"
#include "site.h"

namespace snn {

template <class Scalar, bool IsRecurrent> struct LifRefrac {
  using T = Scalar;
  using Inner = Lif<Scalar, IsRecurrent>;
  static constexpr int States = 3, Count = 6, Traces = 3;  // states v, i, rho; traced: current, v and rho before the step
  static constexpr bool Spikes = true, Recurrent = IsRecurrent, Refractory = true, InnerSpikeGradient = true;
  static constexpr bool AdjointUsesSpike = false, AdjointUsesReset = false, AdjointUsesTraces = true,
                        AdjointUsesBefore = false;
  struct Parameters : Inner::Parameters {
    T rho_reset;
    SNN_HD Parameters(const T* p, int rule) : Inner::Parameters(p, rule), rho_reset(p[5]) {}
  };

  // The spike of the LIF step is who was reset; that of the site is masked.
  template <class Input> SNN_HD static Site<T> step(const Parameters& p, const Input& x, T* state, T& output) {
    const T v = state[0], rho = state[2];
    Site<T> s = Inner::step(p, x, state, output);
    const T mask = positive(rho);
    s.trace[1] = v;
    s.trace[2] = rho;
    s.reset = s.spike;
    s.spike = (T(1) - mask) * s.reset;
    output = s.spike;
    state[0] = (T(1) - mask) * state[0] + mask * v;
    state[2] = (T(1) - s.spike) * relu(rho - mask) + s.spike * p.rho_reset;
    return s;
  }

  SNN_HD static T distance(const Parameters& p, const Site<T>& s) { return Inner::distance(p, s); }
  SNN_HD static T refractory_distance(const Parameters&, const Site<T>& s) { return s.trace[2]; }

  // What a step began with is among its own traces.
  SNN_HD static void left(const Parameters&, const Site<T>&, T* state) {
    for (int i = 0; i < States; i++) state[i] = T(0);
  }

  SNN_HD static T upstream(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& g) {
    const Masked m(p, s, g);
    return Inner::upstream(p, m.site, m.g);
  }
  SNN_HD static T refractory_upstream(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& g) {
    const Masked m(p, s, g);
    return g.state[0] * (s.trace[1] - Inner::after_reset(p, s.u, m.site.spike)) - m.counted - m.spike * m.site.spike;
  }

  // refractory: that of the mask, as phi is that of the LIF step's spike
  SNN_HD static Gradients<T, States, Count> adjoint(const Parameters& p, const Site<T>& s, const T*,
                                                    const Cotangents<T, States>& g, T phi, T refractory) {
    const Masked m(p, s, g);
    const T before[2] = {s.trace[1], T(0)};
    const Gradients<T, 2, 5> inner = Inner::adjoint(p, m.site, before, m.g, phi);
    Gradients<T, States, Count> r;
    r.input = inner.input;
    r.carry[0] = inner.carry[0] + m.mask * g.state[0];
    r.carry[1] = inner.carry[1];
    r.carry[2] = m.counted + refractory;
    for (int i = 0; i < 5; i++) r.parameters[i] = inner.parameters[i];
    r.parameters[5] = g.state[2] * (T(1) - m.mask) * m.site.spike;
    return r;
  }

 private:
  // The LIF step within, and what goes back through the mask.
  struct Masked {
    Site<T> site;
    Cotangents<T, 2> g;
    T mask, spike, counted;  // gradients of the masked spike, and of rho - mask

    SNN_HD Masked(const Parameters& p, const Site<T>& s, const Cotangents<T, States>& arriving) : site(s) {
      site.spike = positive(Inner::distance(p, s));
      mask = positive(s.trace[2]);
      const T open = T(1) - mask, left = s.trace[2] - mask;
      spike = arriving.output + arriving.state[2] * (p.rho_reset - relu(left));
      counted = arriving.state[2] * (T(1) - open * site.spike) * positive(left);
      g.output = open * spike;
      g.state[0] = open * arriving.state[0];
      g.state[1] = arriving.state[1];
    }
  };
};

}  // namespace snn
