// One time step of the units of a layer.
#pragma once
#include "../surrogates.h"
#include "lanes.h"
#include "units.h"

namespace snn {
namespace SSB_ISA {

// Where a step reads and writes; null where nothing is wanted.
template <class N> struct StepTables {
  using P = typename N::T;
  using T = typename P::Scalar;
  const T *input, *recurrent;
  const T* before[N::States];
  T* after[N::States];
  T* states[N::States];
  T *output, *membrane, *traces[kMaxTraces];
  uint64_t *raster, *reset, *active;
  P low, high;  // bounds of the surrogate

  StepTables(const SnnNeuronForward& a, int64_t step)
      : input(entry<T>(a.input, step)), recurrent(entry<T>(a.recurrent, step)),
        output(entry<T>(a.output, step)), membrane(entry<T>(a.membrane, step)),
        raster(entry(a.raster, step)), reset(entry(a.reset, step)), active(N::Spikes ? entry(a.active, step) : nullptr), low(bound<T>(a.layer.surrogate.low)),
        high(bound<T>(a.layer.surrogate.high)) {
    for (int i = 0; i < N::States; i++) {
      before[i] = static_cast<const T*>(step ? a.state_out[i] : a.state_in[i]);
      after[i] = static_cast<T*>(a.state_out[i]);
      states[i] = entry<T>(a.states[i], step);
    }
    for (int i = 0; i < N::Traces; i++) traces[i] = entry<T>(a.traces[i], step);
  }
};

// One unit of one step. `input`: its currents. Appends u of its active sites at `values`, returns the end of these and
// adds to the number of spikes. Each table is written in one go: stores that alternate between tables cost bandwidth.
template <class N>
SNN_HD typename N::T::Scalar* step_unit(const StepTables<N>& s, const Unit& unit, const ParameterLanes<N>& par,
                                        const typename N::T::Scalar* input, typename N::T::Scalar* values,
                                        int64_t& spikes) {
  using P = typename N::T;
  using T = typename P::Scalar;
  const int64_t base = unit.base;
  uint64_t raster = 0, reset = 0, active = 0;
  P state[N::States][P::kPerWord], output[P::kPerWord], u[P::kPerWord],
      trace[kMaxTraces][P::kPerWord];
  for_each_pack<P>(unit.lanes, [&](int k, auto lanes) {
    const int i = k / P::kLanes;
    const typename N::Parameters p = par.at(k);
    P of[N::States];
    for (int q = 0; q < N::States; q++) of[q] = load_lanes(s.before[q] + base + k, lanes);
    P recurrent(T(0)), given(T(0));
    if constexpr (N::Recurrent) recurrent = load_lanes(s.recurrent + base + k, lanes);
    if constexpr (kGivenTrace<N> >= 0) given = load_lanes(s.traces[kGivenTrace<N>] + base + k, lanes);
    const Site<P> site = step_of<N>(p, load_lanes(input + k, lanes), recurrent, given, of, output[i]);
    for (int q = 0; q < N::States; q++) state[q][i] = of[q];
    u[i] = site.u;
    for (int q = 0; q < N::Traces; q++) trace[q][i] = site.trace[q];
    if constexpr (N::Spikes) {
      raster |= static_cast<uint64_t>(nonzero_bits(site.spike)) << k;
      reset |= static_cast<uint64_t>(nonzero_bits(site.reset)) << k;
      if (s.active) active |= static_cast<uint64_t>(inside_bits(N::distance(p, site), s.low, s.high)) << k;
      if constexpr (kRefractory<N>)  // a spike has a gradient through its mask as well
        active |= static_cast<uint64_t>(nonzero_bits(site.reset)) << k;
    }
  });
  const auto write = [&](const P* from, T* to) {
    if (!to) return;
    for_each_pack<P>(unit.lanes, [&](int k, auto lanes) { store_lanes(to + base + k, from[k / P::kLanes], lanes); });
  };
  for (int q = 0; q < N::States; q++) {
    write(state[q], s.after[q]);
    write(state[q], s.states[q]);
  }
  write(output, s.output);
  write(u, s.membrane);
  for (int q = 0; q < N::Traces; q++)
    if (q != kGivenTrace<N>) write(trace[q], s.traces[q]);
  const uint64_t mask = lane_mask(unit.lanes);
  if (s.raster) {
    s.raster[unit.index] = raster & mask;
    spikes += count_bits(raster & mask);
  }
  if (s.reset) s.reset[unit.index] = reset & mask;
  if (s.active) {
    s.active[unit.index] = active &= mask;
    for_each_pack<P>(unit.lanes, [&](int k, auto) { values = append(u[k / P::kLanes], active >> k, values); });
  }
  return values;
}

}  // namespace SSB_ISA
}  // namespace snn
