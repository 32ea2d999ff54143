// The backward scan of neurons: units of 64 neurons of one batch row, all steps in reverse. Compiled without
// contraction of multiply and add, so that results are the same with every instruction set.
#include <algorithm>

#include "../surrogates.h"
#include "kernels.h"
#include "lanes.h"
#include "parallel.h"
#include "units.h"

namespace snn {
namespace SSB_ISA {
namespace {

constexpr int64_t kUnitsPerTask = 64;
constexpr int64_t kStrip = 16;  // values that the surrogate derivative is computed of at once

// phi[k] = g[k] times the derivative at x[k]; goes on to the next multiple of kStrip.
template <class T>
__attribute__((noinline)) void apply_surrogate(const SnnSurrogate& s, const T* __restrict x, const T* __restrict g,
                                               T* __restrict phi, int64_t count) {
  const T low = bound<T>(s.low), high = bound<T>(s.high);
  visit_surrogate<T>(s, [&](auto derivative) {
    for (int64_t first = 0; first < count; first += kStrip)
      for (int64_t k = first; k < first + kStrip; k++) phi[k] = inside(x[k], low, high) ? derivative(x[k], g[k]) : T(0);
  });
}

// What one step reads; null where there is nothing.
template <class N> struct BackwardTables {
  using T = typename N::T::Scalar;
  const T *output, *recurrent, *at_active, *outside[N::States], *values;
  const T *membrane, *derivative, *traces[kMaxTraces];
  const uint64_t *raster, *reset, *active;

  BackwardTables(const SnnNeuronBackward& a, int64_t step)
      : output(entry<T>(a.grad_output, step)),
        recurrent(step == a.steps - 1 ? static_cast<const T*>(a.grad_recurrent) : nullptr),
        at_active(entry<T>(a.grad_active, step)),
        values(entry<T>(a.values, step)), membrane(entry<T>(a.membrane, step)),
        derivative(entry<T>(a.derivative, step)),
        raster(entry(a.raster, step)), reset(entry(a.reset, step)), active(entry(a.active, step)) {
    for (int i = 0; i < N::States; i++) outside[i] = entry<T>(a.grad_states[i], step);
    for (int i = 0; i < N::Traces; i++) traces[i] = entry<T>(a.traces[i], step);
  }
};

// One task: units [first, last), all steps, the carried gradient in cache. Learn: gradients of parameters are wanted.
template <class N, bool Learn> class BackwardTask {
  using P = typename N::T;
  using T = typename P::Scalar;
  using Gradient = Cotangents<P, N::States>;
  using Tables = BackwardTables<N>;

 public:
  BackwardTask(const SnnNeuronBackward& a, int64_t first, int64_t last)
      : a_(a), first_(first), last_(last), room_(64 * (last - first) + kPadding), par_(a.layer),
        carry_(64 * (last - first) * N::States), packed_(3 * room_) {
    std::fill(carry_.get(), carry_.get() + 64 * (last - first) * N::States, T(0));
    for (int i = 0; i < N::States; i++)
      if (const T* from = static_cast<const T*>(a_.carry_in[i]))
        for (Unit unit(a_.layer, first_); unit.index < last_; unit.next())
          copy_lanes(from + unit.base, carry(unit, i), unit.lanes);
  }

  // offsets[step]: place of this task's first active site among those of the step
  void run(const int64_t* offsets) {
    for (int64_t step = a_.steps - 1; step >= 0; step--) {
      const bool follows = step > 0 || a_.earlier > 0;
      const Tables s(a_, step), before(a_, follows ? step - 1 : 0);
      int64_t offset = offsets[step];
      const T* phi = task_phi(s, offset);  // of this task's active sites, one after the other
      T* input = static_cast<T*>(a_.grad_input);
      if (input) input += step * a_.layer.rows * a_.layer.cols;
      for (Unit unit(a_.layer, first_); unit.index < last_; unit.next()) {
        par_.load(a_.layer, unit);
        Phi of{nullptr, phi, 0};
        if (phi)
          of.active = s.active[unit.index];
        else
          of = unit_phi(s, unit, offset);
        if constexpr (kRefractory<N>) refractory_phi(s, unit, offset);
        adjoint(s, follows ? &before : nullptr, unit, offset, of, input ? input + unit.base : nullptr);
        if (phi) phi += count_bits(of.active);
        if (s.active) offset += count_bits(s.active[unit.index]);
      }
    }
    for (int i = 0; i < N::States; i++)
      if (T* out = static_cast<T*>(a_.grad_state_in[i]))
        for (Unit unit(a_.layer, first_); unit.index < last_; unit.next())
          copy_lanes(carry(unit, i), out + unit.base, unit.lanes);
  }

 private:
  static constexpr int64_t kPadding = 64;
  // What else a step reads, because its adjoint or that of the step behind it asks for it.
  static constexpr bool kBefore = Learn || N::AdjointUsesBefore, kTraces = Learn || N::AdjointUsesTraces;
  static constexpr bool kSpike = kBefore || N::AdjointUsesSpike, kReset = kBefore || N::AdjointUsesReset;
  // Surrogate derivative times what arrives at the spike decision: for all 64 lanes, or for the active ones.
  struct Phi {
    const T *dense, *packed;
    uint64_t active;
  };

  T* carry(const Unit& unit, int state) const {
    return carry_.get() + 64 * ((unit.index - first_) * N::States + state);
  }

  // What the adjoint does not use is not read. Compressed membranes leave u to unit_phi.
  template <class Count> SNN_HD Site<P> site(const Tables& s, const Unit& unit, int k, Count lanes) const {
    Site<P> site{};
    if (kSpike && s.raster) site.spike = ones<P>(s.raster[unit.index] >> k);
    if (kReset && s.reset) site.reset = ones<P>(s.reset[unit.index] >> k);
    if (s.membrane) site.u = load_lanes(s.membrane + unit.base + k, lanes);
    for (int i = 0; kTraces && i < N::Traces; i++)
      if (s.traces[i]) site.trace[i] = load_lanes(s.traces[i] + unit.base + k, lanes);
    return site;
  }

  template <class Count> SNN_HD Gradient total(const Tables& s, const Unit& unit, int k, Count lanes) const {
    Gradient g;
    g.output = s.output ? load_lanes(s.output + unit.base + k, lanes) : P(T(0));
    if (s.recurrent) g.output = g.output + load_lanes(s.recurrent + unit.base + k, lanes);
    for (int i = 0; i < N::States; i++) {
      const P outside = s.outside[i] ? load_lanes(s.outside[i] + unit.base + k, lanes) : P(T(0));
      g.state[i] = P::load(carry(unit, i) + k) + outside;
    }
    return g;
  }

  // An output nobody uses sends no gradient at all (not zeros: 0 times an infinite derivative would be NaN).
  bool decides(const Tables& s) const {
    const bool wanted = s.output || s.at_active || s.recurrent || N::InnerSpikeGradient;
    return N::Spikes && a_.layer.surrogate.kind != kZeroDerivative && wanted;
  }

  // The common case of the sparse backward: gradients at the active sites only, and nothing else that phi depends on.
  // Then phi of all active sites of the task is one run of values, computed at once. Null where it is not so simple.
  const T* task_phi(const Tables& s, int64_t offset) {
    if constexpr (N::Spikes && !N::InnerSpikeGradient && !kBefore && !kTraces) {
      if (!par_.scalar || !decides(s) || !s.at_active || s.output || s.recurrent || s.membrane) return nullptr;
      int64_t count = 0;
      for (int64_t unit = first_; unit < last_; unit++) count += count_bits(s.active[unit]);
      const typename N::Parameters p = par_.at(0);
      T *x = packed_.get(), *upstream = x + room_, *phi = upstream + room_;
      const auto body = [&](int64_t k, auto lanes) {
        Site<P> of{};
        of.u = load_lanes(s.values + offset + k, lanes);
        (s.derivative ? load_lanes(s.derivative + offset + k, lanes) : N::distance(p, of)).store(x + k);
        const Gradient g{load_lanes(s.at_active + offset + k, lanes), {}};
        N::upstream(p, of, g).store(upstream + k);
      };
      int64_t k = 0;
      for (; k + P::kLanes <= count; k += P::kLanes) body(k, std::integral_constant<int, P::kLanes>());
      if (k < count) body(k, static_cast<int>(count - k));
      fill_strip(x, count);
      fill_strip(upstream, count);
      apply_surrogate(a_.layer.surrogate, x, upstream, phi, count);
      return phi;
    } else {
      return nullptr;
    }
  }
  static void fill_strip(T* values, int64_t count) { std::fill(values + count, values + count + kStrip, T(0)); }

  Phi unit_phi(const Tables& s, const Unit& unit, int64_t offset) {
    if constexpr (N::Spikes) {
      if (!decides(s)) return {nullptr, nullptr, 0};
      T *x = x_, *upstream = upstream_;
      const uint64_t word = s.active ? s.active[unit.index] : 0;
      if (s.membrane) {
        const T* at_active = s.at_active ? s.at_active + offset : nullptr;
        if (unit.lanes < 64) {
          std::fill(x, x + 64, T(0));
          std::fill(upstream, upstream + 64, T(0));
        }
        for_each_pack<P>(unit.lanes, [&](int k, auto lanes) {
          const typename N::Parameters p = par_.at(k);
          const Site<P> of = site(s, unit, k, lanes);
          Gradient g = total(s, unit, k, lanes);
          if (at_active) g.output = g.output + take(at_active, word >> k);
          (s.derivative ? load_lanes(s.derivative + unit.base + k, lanes) : N::distance(p, of)).store(x + k);
          N::upstream(p, of, g).store(upstream + k);
        });
        apply_surrogate(a_.layer.surrogate, x, upstream, phi_, 64);
        return {phi_, nullptr, 0};
      }
      if (!word) return {nullptr, phi_, 0};
      const T *value = s.values + offset, *at_active = s.at_active ? s.at_active + offset : nullptr;
      const T* given = s.derivative ? s.derivative + offset : nullptr;
      for_each_pack<P>(unit.lanes, [&](int k, auto lanes) {
        const typename N::Parameters p = par_.at(k);
        const uint64_t bits = word >> k & lane_mask(P::kLanes);
        Site<P> of = site(s, unit, k, lanes);
        of.u = take(value, bits);
        Gradient g = total(s, unit, k, lanes);
        if (at_active) g.output = g.output + take(at_active, bits);
        upstream = append(N::upstream(p, of, g), bits, upstream);
        x = append(given ? take(given, bits) : N::distance(p, of), bits, x);
      });
      fill_strip(x, 0);
      fill_strip(upstream, 0);
      apply_surrogate(a_.layer.surrogate, x_, upstream_, phi_, x - x_);
      return {nullptr, phi_, word};
    } else {
      return {nullptr, nullptr, 0};
    }
  }

  // The same of the second threshold comparison, which has no sites where it could be left out.
  void refractory_phi(const Tables& s, const Unit& unit, int64_t offset) {
    if (unit.lanes < 64) {
      std::fill(x_, x_ + 64, T(0));
      std::fill(upstream_, upstream_ + 64, T(0));
    }
    const uint64_t word = s.at_active ? s.active[unit.index] : 0;
    const T* at_active = s.at_active ? s.at_active + offset : nullptr;
    for_each_pack<P>(unit.lanes, [&](int k, auto lanes) {
      const typename N::Parameters p = par_.at(k);
      const Site<P> of = site(s, unit, k, lanes);
      Gradient g = total(s, unit, k, lanes);
      if (at_active) g.output = g.output + take(at_active, word >> k & lane_mask(P::kLanes));
      N::refractory_distance(p, of).store(x_ + k);
      N::refractory_upstream(p, of, g).store(upstream_ + k);
    });
    apply_surrogate(a_.layer.surrogate, x_, upstream_, refractory_, 64);
  }

  // previous: the tables of the step before, null in the first
  void adjoint(const Tables& s, const Tables* previous, const Unit& unit, int64_t offset, const Phi& phi, T* input) {
    const T* packed = phi.packed;
    // Gradients of parameters see the whole gradient of the output, and u where it was compressed.
    const bool sparse_output = Learn && s.at_active, sparse_u = Learn && s.values && !s.membrane;
    const uint64_t active = sparse_output || sparse_u ? s.active[unit.index] : 0;
    const T* at_active = sparse_output ? s.at_active + offset : nullptr;
    const T* value = sparse_u ? s.values + offset : nullptr;
    for_each_pack<P>(unit.lanes, [&](int k, auto lanes) {
      const typename N::Parameters p = par_.at(k);
      Site<P> of = site(s, unit, k, lanes);
      Gradient g = total(s, unit, k, lanes);
      if (sparse_output) g.output = g.output + take(at_active, active >> k & lane_mask(P::kLanes));
      if (sparse_u) of.u = take(value, active >> k & lane_mask(P::kLanes));
      P before[N::States]{}, derivative(T(0));
      if (kBefore && previous) N::left(p, site(*previous, unit, k, lanes), before);
      for (int i = 0; kBefore && !previous && i < N::States; i++)
        before[i] = load_lanes(static_cast<const T*>(a_.state_in[i]) + unit.base + k, lanes);
      if (phi.dense)
        derivative = P::load(phi.dense + k);
      else if (packed)
        derivative = take(packed, phi.active >> k & lane_mask(P::kLanes));
      Gradients<P, N::States, N::Count> r;
      if constexpr (kRefractory<N>)
        r = N::adjoint(p, of, before, g, derivative, P::load(refractory_ + k));
      else
        r = N::adjoint(p, of, before, g, derivative);
      if (input) store_lanes(input + k, r.input, lanes);
      for (int i = 0; i < N::States; i++) r.carry[i].store(carry(unit, i) + k);
      for (int q = 0; Learn && q < N::Count; q++)
        if (T* sum = static_cast<T*>(a_.grad_parameters[q])) {
          sum += unit.base + k;
          store_lanes(sum, load_lanes(sum, lanes) + r.parameters[q], lanes);
        }
    });
  }

  const SnnNeuronBackward& a_;
  const int64_t first_, last_, room_;
  ParameterLanes<N> par_;
  Scratch<T> carry_, packed_;
  alignas(64) T x_[64 + kPadding], upstream_[64 + kPadding], phi_[64 + kPadding], refractory_[kRefractory<N> ? 64 : 1];
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

int64_t neuron_backward(const SnnNeuronBackward& a) {
  return visit_packs(a.layer, [&](auto tag) { return backward<typename decltype(tag)::Neuron>(a); });
}

}  // namespace SSB_ISA
}  // namespace snn
