// What the neuron structs have in common. A neuron model is a struct of static functions on one site (batch row,
// neuron); the CPU scan runs it on the lanes of a vector as its number type, a CUDA kernel on a number in each thread.
//
//   States                 how many state variables are carried from step to step (the first is the membrane)
//   Recurrent              step() takes a Drive; a spike passes a gradient on through the recurrence as well
//   Traces                 how many values a step may record besides u, for its adjoint
//   GivenTrace             which of them, if any, is not computed here: step() takes it, after the input
//   Spikes                 has a threshold comparison
//   Refractory             if there: the spike is masked by a second threshold comparison, whose phi adjoint() takes as
//                          well, at every site; it has u at every site, too, and `reset` tells who would have spiked
//   InnerSpikeGradient     the neuron's own dynamics send a gradient to the spike decision (reset not detached)
//   AdjointUsesSpike/Reset/Traces/Before   whether the adjoint, parameter gradients aside, depends on who spiked, who
//                          was reset, what was traced, and the states before the step
//   Parameters             the parameter values at this site, in the order of its Dynamics, and the reset rule
//   step()                 one time step, in the host library's own order of operations
//   distance()             of u from the threshold: what the surrogate derivative is taken of
//   upstream()             gradient that arrives at the spike function: outside and inner parts
//   adjoint()              the rest of the reverse step, given phi = upstream * surrogate derivative
//   left()                 the states that a step left behind, as far as adjoints ask for them
//   refractory_distance(), refractory_upstream()   the same of the second threshold comparison
#pragma once
#include "../abi.h"
#include "../portable.h"
#include <type_traits>

namespace snn {

// 1 where x is positive, else 0 (at NaN too). A scan over vectors brings its own.
SNN_HD float positive(float x) { return x > 0 ? 1.f : 0.f; }
SNN_HD double positive(double x) { return x > 0 ? 1. : 0.; }
// Zero where x is negative.
SNN_HD float relu(float x) { return x < 0 ? 0.f : x; }
SNN_HD double relu(double x) { return x < 0 ? 0. : x; }

// One site at one time step: u at the threshold comparison, and what else was recorded; spike and reset are 0 or 1.
template <class T> struct Site {
  T u, trace[kMaxTraces], spike, reset;
};

// What drives a recurrent neuron; added to what it has in the order of the host libraries.
template <class T> struct Drive {
  T input, recurrent;
  SNN_HD friend T operator+(const T& a, const Drive& d) { return (a + d.input) + d.recurrent; }
};

template <class N, class = void> constexpr int kGivenTrace = -1;  // none
template <class N> constexpr int kGivenTrace<N, std::void_t<decltype(N::GivenTrace)>> = N::GivenTrace;

template <class N, class = void> constexpr bool kRefractory = false;
template <class N> constexpr bool kRefractory<N, std::void_t<decltype(N::Refractory)>> = N::Refractory;

// A step with the current of the recurrence and the given trace, where the neuron has them.
template <class N, class T>
SNN_HD Site<T> step_of(const typename N::Parameters& p, T input, T recurrent, T given, T* state, T& output) {
  const auto run = [&](const auto& x) {
    if constexpr (kGivenTrace<N> >= 0)
      return N::step(p, x, given, state, output);
    else
      return N::step(p, x, state, output);
  };
  if constexpr (N::Recurrent)
    return run(Drive<T>{input, recurrent});
  else
    return run(input);
}

// Gradients at one site: from outside for the output, and for the states from outside plus the carried part.
template <class T, int States> struct Cotangents {
  T output;
  T state[States];
};

template <class T, int States, int Count> struct Gradients {
  T input;
  T carry[States];          // of the states before the step
  T parameters[Count];
};

}  // namespace snn
