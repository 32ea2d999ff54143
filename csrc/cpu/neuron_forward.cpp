// The forward scan of neurons. Time is the outer loop; inside, a unit is one raster word: 64 neurons of one batch row.
// Compiled without contraction of multiply and add: membrane and spikes must equal the host's.
#include <algorithm>

#include "kernels.h"
#include "neuron_step.h"
#include "parallel.h"

namespace snn {
namespace SSB_ISA {
namespace {

constexpr int64_t kUnitsPerTask = 64;

template <class N> int64_t forward(const SnnNeuronForward& a) {
  using T = typename N::T::Scalar;
  const int64_t units = a.layer.rows * words_of(a.layer.cols);
  const int64_t per_task = a.layer.threads > 1 ? kUnitsPerTask : std::max<int64_t>(units, 1);
  const int64_t tasks = (units + per_task - 1) / per_task;
  T *values = static_cast<T*>(a.values), *scratch = static_cast<T*>(a.scratch);
  Buffer<int64_t, 128> counts;
  int64_t *appended = counts.room(2 * tasks), *spikes = appended + tasks;
  int64_t used = 0;
  for (int64_t step = 0; step < a.steps; step++) {
    const StepTables<N> tables(a, step);
    if (tables.active && values && used + 64 * units > a.values_capacity) return step;
    // A single task writes its values where they belong; those of several have to be put together.
    const bool direct = tasks == 1 && values;
    parallel_for(tasks, a.layer.threads, [&](int64_t task) {
      ParameterLanes<N> par(a.layer);
      const int64_t first = task * per_task, end = std::min(units, first + per_task);
      T *begin = direct ? values + used : scratch ? scratch + 64 * first : nullptr, *value = begin;
      int64_t count = 0;
      for (Unit unit(a.layer, first); unit.index < end; unit.next()) {
        par.load(a.layer, unit);
        value = step_unit<N>(tables, unit, par, tables.input + unit.base, value, count);
      }
      appended[task] = value - begin;
      spikes[task] = count;
    });
    int64_t active = 0, spiking = 0;
    for (int64_t task = 0; task < tasks; task++) {
      if (tables.active && values && !direct)
        std::copy_n(scratch + 64 * per_task * task, appended[task], values + used + active);
      active += appended[task];
      spiking += spikes[task];
    }
    if (tables.raster && a.spike_counts) a.spike_counts[step] = spiking;
    if (tables.active && a.active_counts) a.active_counts[step] = active;
    used += active;
  }
  return a.steps;
}

}  // namespace

int64_t neuron_forward(const SnnNeuronForward& a) {
  return visit_packs(a.layer, [&](auto tag) { return forward<typename decltype(tag)::Neuron>(a); });
}

}  // namespace SSB_ISA
}  // namespace snn
