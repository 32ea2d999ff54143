// Neuron scans. Time is the outer loop; inside, a unit is one raster word: 64 neurons of one batch row, handled as
// lanes of vectors. Compiled without contraction of multiply and add: membrane and spikes must equal the host's.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../neurons/visit.h"
#include "../raster.h"
#include "../surrogates.h"
#include "kernels.h"
#include "parallel.h"
#include "units.h"

namespace snn {
namespace SSB_ISA {
namespace {

constexpr int64_t kUnitsPerTask = 64;

// ------------------------------------------------------------------------------------------------ forward

// One unit of one step; appends u of its active sites at `values` and returns the end of what it appended.
template <class N>
typename N::T* forward_unit(const SnnNeuronForward& a, int64_t step, const Unit& unit, ParameterLanes<N>& par,
                            typename N::T* values) {
  using T = typename N::T;
  const int64_t lanes = unit.lanes, base = unit.base;
  const T* x = static_cast<const T*>(a.input[step]) + base;
  const T low = bound<T>(a.layer.surrogate.low), high = bound<T>(a.layer.surrogate.high);
  par.load(a.layer, unit);
  T state[N::States][64], output[64], u[64], current[64], spike[64] = {}, reset[64] = {}, active[64] = {};
  for (int i = 0; i < N::States; i++)
    copy_lanes(static_cast<const T*>(step ? a.state_out[i] : a.state_in[i]) + base, state[i], lanes);
  with_lanes(lanes, [&](auto count) {
    for (int64_t k = 0; k < count; k++) {
      const typename N::Parameters p = par.at(k);
      T s[N::States], out;
      for (int i = 0; i < N::States; i++) s[i] = state[i][k];
      const Site<T> site = N::step(p, x[k], s, out);
      for (int i = 0; i < N::States; i++) state[i][k] = s[i];
      output[k] = out;
      u[k] = site.u;
      current[k] = site.current;
      spike[k] = site.spike;
      reset[k] = site.reset;
      active[k] = inside(site.u - p.threshold, low, high) ? T(1) : T(0);
    }
    for (int i = 0; i < N::States; i++) {
      copy_lanes(state[i], static_cast<T*>(a.state_out[i]) + base, count);
      if (T* out = entry<T>(a.states[i], step)) copy_lanes(state[i], out + base, count);
    }
    if (T* out = entry<T>(a.output, step)) copy_lanes(output, out + base, count);
    if (T* out = entry<T>(a.membrane, step)) copy_lanes(u, out + base, count);
    if (N::HasCurrent)
      if (T* out = entry<T>(a.current, step)) copy_lanes(current, out + base, count);
    if (uint64_t* out = entry(a.raster, step)) out[unit.index] = pack_lanes(spike, count);
    if (uint64_t* out = entry(a.reset, step)) out[unit.index] = pack_lanes(reset, count);
    if (uint64_t* out = entry(a.active, step)) {
      out[unit.index] = pack_lanes(active, count);
      values = append_lanes(u, out[unit.index], values);
    }
  });
  return values;
}

template <class N> int64_t forward(const SnnNeuronForward& a) {
  using T = typename N::T;
  const int64_t units = a.layer.rows * words_of(a.layer.cols);
  const int64_t tasks = (units + kUnitsPerTask - 1) / kUnitsPerTask;
  T *values = static_cast<T*>(a.values), *scratch = static_cast<T*>(a.scratch);
  std::vector<int64_t> appended(tasks);
  int64_t used = 0;
  for (int64_t step = 0; step < a.steps; step++) {
    const uint64_t *active = entry(a.active, step), *raster = entry(a.raster, step);
    if (active && values && used + 64 * units > a.values_capacity) return step;
    parallel_for(tasks, a.layer.threads, [&](int64_t task) {
      ParameterLanes<N> par(a.layer);
      const int64_t first = task * kUnitsPerTask, end = std::min(units, first + kUnitsPerTask);
      T* value = scratch + 64 * first;
      for (Unit unit(a.layer, first); unit.index < end; unit.next())
        value = forward_unit<N>(a, step, unit, par, value);
      appended[task] = value - (scratch + 64 * first);
    });
    if (raster && a.spike_counts) a.spike_counts[step] = raster_count({raster, units});
    if (!active) continue;
    const int64_t before = used;
    for (int64_t task = 0; task < tasks; task++) {
      if (values) std::memcpy(values + used, scratch + 64 * kUnitsPerTask * task, appended[task] * sizeof(T));
      used += appended[task];
    }
    if (a.active_counts) a.active_counts[step] = used - before;
  }
  return a.steps;
}

// ------------------------------------------------------------------------------------------------ backward

template <class T> void apply_surrogate(const SnnSurrogate& s, const T* x, const T* g, T* phi, int64_t lanes) {
  const T low = bound<T>(s.low), high = bound<T>(s.high);
  visit_surrogate<T>(s, [&](auto derivative) {
    with_lanes(lanes, [&](auto count) {
      for (int64_t k = 0; k < count; k++) phi[k] = inside(x[k], low, high) ? derivative(x[k], g[k]) : T(0);
    });
  });
}
// The sites of a unit, lane by lane. What the adjoint does not use is not filled in.
template <class T> struct SiteLanes {
  T u[64], current[64], spike[64], reset[64];
  SNN_HD Site<T> at(int64_t k) const { return {u[k], current[k], spike[k], reset[k]}; }
};

// One task of the backward scan: units [first, last), all steps in reverse, the carried gradient in cache.
// Learn: gradients of parameters are wanted.
template <class N, bool Learn> class BackwardTask {
  using T = typename N::T;
  using Gradient = Cotangents<T, N::States>;

 public:
  BackwardTask(const SnnNeuronBackward& a, int64_t first, int64_t last)
      : a_(a), first_(first), last_(last), par_(a.layer), carry_(64 * (last - first) * N::States),
        packed_(2 * 64 * (last - first) + 64) {
    std::fill(carry_.get(), carry_.get() + 64 * (last - first) * N::States, T(0));
  }

  // offsets[step]: place of this task's first active site among those of the step
  void run(const int64_t* offsets) {
    for (int64_t step = a_.steps - 1; step >= 0; step--) {
      int64_t offset = offsets[step];
      const uint64_t* active = entry(a_.active, step);
      const T* packed = pack_spike_gradients(step, offset);
      for (Unit unit(a_.layer, first_); unit.index < last_; unit.next()) {
        if (packed) {
          T phi[64];
          packed = expand_lanes(packed, active[unit.index], phi);
          backward_unit(step, unit, offset, phi);
          continue;
        }
        backward_unit(step, unit, offset, nullptr);
        if (active) offset += count_bits(active[unit.index]);
      }
    }
    for (int i = 0; i < N::States; i++)
      if (T* out = static_cast<T*>(a_.grad_state_in[i]))
        for (Unit unit(a_.layer, first_); unit.index < last_; unit.next())
          copy_lanes(carry(unit, i), out + unit.base, unit.lanes);
  }

 private:
  T* carry(const Unit& unit, int state) { return carry_.get() + 64 * ((unit.index - first_) * N::States + state); }

  void load_sites(int64_t step, const Unit& unit, SiteLanes<T>& site) const {
    const uint64_t *raster = entry(a_.raster, step), *reset = entry(a_.reset, step);
    if (Learn || N::AdjointUsesSpike) unpack_lanes(raster ? raster[unit.index] : 0, site.spike);
    if (Learn || N::AdjointUsesReset) unpack_lanes(reset ? reset[unit.index] : 0, site.reset);
    if (const T* u = entry<T>(a_.membrane, step))
      copy_lanes(u + unit.base, site.u, unit.lanes);
    else if (Learn)
      std::fill(site.u, site.u + 64, T(0));
    if (!Learn || !N::HasCurrent) return;
    if (const T* current = entry<T>(a_.current, step))
      copy_lanes(current + unit.base, site.current, unit.lanes);
    else
      std::fill(site.current, site.current + 64, T(0));
  }

  // The membrane before the step, for parameter gradients.
  void load_before(int64_t step, const Unit& unit, T* before) const {
    if (step == 0) return copy_lanes(static_cast<const T*>(a_.state_in[0]) + unit.base, before, unit.lanes);
    SiteLanes<T> site;
    load_sites(step - 1, unit, site);
    for (int64_t k = 0; k < unit.lanes; k++) before[k] = N::left(par_.at(k), site.at(k));
  }

  SNN_HD Gradient total(const T* output, int64_t k, const Unit& unit, const T* const* outside) {
    Gradient g;
    g.output = output[k];
    for (int i = 0; i < N::States; i++) g.state[i] = carry(unit, i)[k] + (outside[i] ? outside[i][k] : T(0));
    return g;
  }

  // The common case of the sparse backward: gradients at the active sites only, and nothing else that phi depends on.
  // Then phi of all active sites of the task is one run of values, computed at once. Null where it is not so simple.
  const T* pack_spike_gradients(int64_t step, int64_t offset) {
    const T* at_active = entry<T>(a_.grad_active, step);
    const bool simple = N::Spikes && !N::InnerSpikeGradient && !Learn && par_.scalar && at_active &&
                        a_.layer.surrogate.kind != kZeroDerivative && !entry<T>(a_.grad_output, step) &&
                        !entry<T>(a_.membrane, step);
    if (!simple) return nullptr;
    const uint64_t* active = entry(a_.active, step);
    const T* value = static_cast<const T*>(a_.values[step]) + offset;
    const int64_t count = raster_count({active + first_, last_ - first_});
    const typename N::Parameters p = par_.at(0);
    T *x = packed_.get(), *upstream = x + 64 * (last_ - first_);
    for (int64_t k = 0; k < count; k++) {
      x[k] = value[k] - p.threshold;
      upstream[k] = N::upstream(p, Site<T>{}, Gradient{at_active[offset + k], {}});
    }
    apply_surrogate(a_.layer.surrogate, x, upstream, x, count);
    return x;
  }

  // phi = surrogate derivative times the gradient that arrives at the spike decision
  void spike_gradient(int64_t step, const Unit& unit, int64_t offset, const T* at_active,
                      const T* const* outside, SiteLanes<T>& site, T* output, T* phi) {
    const uint64_t* active = entry(a_.active, step);
    if (at_active) at_active += offset;
    if (at_active && (Learn || entry<T>(a_.membrane, step)))
      for_each_bit(active[unit.index], [&, value = at_active](int k) mutable { output[k] += *value++; });
    if (entry<T>(a_.membrane, step)) {
      T x[64], upstream[64];
      with_lanes(unit.lanes, [&](auto count) {
        for (int64_t k = 0; k < count; k++) {
          const typename N::Parameters p = par_.at(k);
          x[k] = site.u[k] - p.threshold;
          upstream[k] = N::upstream(p, site.at(k), total(output, k, unit, outside));
        }
      });
      return apply_surrogate(a_.layer.surrogate, x, upstream, phi, unit.lanes);
    }
    const T* value = static_cast<const T*>(a_.values[step]) + offset;
    T x[64], upstream[64], packed[64];
    int64_t count = 0;
    for_each_bit(active[unit.index], [&](int k) {
      const typename N::Parameters p = par_.at(k);
      Gradient g = total(output, k, unit, outside);
      if (!Learn && at_active) g.output += at_active[count];
      site.u[k] = value[count];
      x[count] = site.u[k] - p.threshold;
      upstream[count++] = N::upstream(p, site.at(k), g);
    });
    apply_surrogate(a_.layer.surrogate, x, upstream, packed, count);
    std::fill(phi, phi + 64, T(0));
    for_each_bit(active[unit.index], [&, next = packed](int k) mutable { phi[k] = *next++; });
  }

  // known: phi, where it was computed already
  void backward_unit(int64_t step, const Unit& unit, int64_t offset, const T* known) {
    const int64_t lanes = unit.lanes;
    par_.load(a_.layer, unit);
    SiteLanes<T> site;
    load_sites(step, unit, site);
    T output[64], computed[64], before[64];
    const T *dense = entry<T>(a_.grad_output, step), *at_active = entry<T>(a_.grad_active, step);
    const T* outside[N::States];
    for (int i = 0; i < N::States; i++) {
      outside[i] = entry<T>(a_.grad_states[i], step);
      if (outside[i]) outside[i] += unit.base;
    }
    if (dense)
      copy_lanes(dense + unit.base, output, lanes);
    else if (!known)
      std::fill(output, output + 64, T(0));
    // An output nobody uses sends no gradient at all (not zeros: 0 times an infinite derivative would be NaN).
    const bool wanted = dense || at_active || N::InnerSpikeGradient;
    if (!known && N::Spikes && a_.layer.surrogate.kind != kZeroDerivative && wanted)
      spike_gradient(step, unit, offset, at_active, outside, site, output, computed);
    else if (!known)
      std::fill(computed, computed + 64, T(0));
    const T* phi = known ? known : computed;
    if (Learn) load_before(step, unit, before);
    T* sums[N::Count];
    for (int p = 0; Learn && p < N::Count; p++) {
      sums[p] = static_cast<T*>(a_.grad_parameters[p]);
      if (sums[p]) sums[p] += unit.base;
    }
    T unwanted[64], *input = static_cast<T*>(a_.grad_input);
    input = input ? input + step * a_.layer.rows * a_.layer.cols + unit.base : unwanted;
    with_lanes(lanes, [&](auto count) {
      for (int64_t k = 0; k < count; k++) {
        const Gradients<T, N::States, N::Count> r =
            N::adjoint(par_.at(k), site.at(k), Learn ? before[k] : T(0), total(output, k, unit, outside), phi[k]);
        input[k] = r.input;
        for (int i = 0; i < N::States; i++) carry(unit, i)[k] = r.carry[i];
        for (int p = 0; Learn && p < N::Count; p++)
          if (sums[p]) sums[p][k] += r.parameters[p];
      }
    });
  }

  const SnnNeuronBackward& a_;
  const int64_t first_, last_;
  ParameterLanes<N> par_;
  Scratch<T> carry_, packed_;
};

template <class N> int64_t backward(const SnnNeuronBackward& a) {
  const int64_t units = a.layer.rows * words_of(a.layer.cols);
  const int64_t tasks = (units + kUnitsPerTask - 1) / kUnitsPerTask;
  Scratch<int64_t> offsets(tasks * a.steps);  // [tasks, steps]
  std::fill(offsets.get(), offsets.get() + tasks * a.steps, int64_t(0));
  for (int64_t step = 0; step < a.steps; step++) {
    const uint64_t* active = entry(a.active, step);
    int64_t count = 0;
    for (int64_t unit = 0; active && unit < units; unit++) {
      if (unit % kUnitsPerTask == 0) offsets[unit / kUnitsPerTask * a.steps + step] = count;
      count += count_bits(active[unit]);
    }
  }
  bool learn = false;
  for (int p = 0; p < N::Count; p++) learn |= a.grad_parameters[p] != nullptr;
  parallel_for(tasks, a.layer.threads, [&](int64_t task) {
    const int64_t first = task * kUnitsPerTask, last = std::min(units, first + kUnitsPerTask);
    if (learn)
      BackwardTask<N, true>(a, first, last).run(&offsets[task * a.steps]);
    else
      BackwardTask<N, false>(a, first, last).run(&offsets[task * a.steps]);
  });
  return a.steps;
}

}  // namespace

int64_t neuron_forward(const SnnNeuronForward& a) {
  return visit_layer(a.layer, [&](auto tag) { return forward<typename decltype(tag)::Neuron>(a); });
}
int64_t neuron_backward(const SnnNeuronBackward& a) {
  return visit_layer(a.layer, [&](auto tag) { return backward<typename decltype(tag)::Neuron>(a); });
}

}  // namespace SSB_ISA
}  // namespace snn
