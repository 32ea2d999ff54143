// Backward scan: one thread a site, all steps in reverse, the carried gradient in registers. What a step needs at its
// active sites only is loaded there only. Compiled without contraction of multiply and add, like the forward scan.
#include "kernels.h"
#include "scan.h"

namespace snn {
namespace cuda {
namespace {

struct Step {
  const void *grad_output, *grad_active, *grad_states[kMaxStates], *values, *membrane, *derivative, *traces[kMaxTraces];
  const uint64_t *raster, *reset, *active;
  const int64_t* offsets;
};

// By value, so that a captured launch keeps them. step[0] is the step before the first one, where there is one.
struct Arguments {
  SnnLayer layer;
  const void* state_in[kMaxStates];  // before the first step, if that is the sequence's first
  const void* carry_in[kMaxStates];  // null: zero
  void* carry_out[kMaxStates];      // null: not wanted
  const void* grad_recurrent;       // of the output of the last step; null: none
  void* grad_input;                 // of the first step
  void* grad_parameters[kMaxParameters];
  int64_t steps;
  Step step[1 + kStepsPerLaunch];
};
static_assert(sizeof(Arguments) <= 4096, "larger than the arguments of a kernel may be");

// What one step loads; filled some steps ahead of its use.
template <class T> struct Loaded {
  T output, u, traces[kMaxTraces], states[kMaxStates];
  bool active, spike, reset;  // active: the surrogate derivative has to be evaluated
};

// Learn: gradients of parameters are wanted. Given: derivatives come in a table, which costs registers; such a scan
// learns, too, as far as it has where to put it.
template <class N, bool Learn, bool Given> class Scan {
  using T = typename N::T;
  // What else a step reads, because its adjoint or that of the step behind it asks for it.
  static constexpr bool kBefore = Learn || N::AdjointUsesBefore, kTraces = Learn || N::AdjointUsesTraces;
  static constexpr int kGroup = Learn || sizeof(T) > 4 || N::States > 2 ? kAhead / 2 : kAhead;  // more would not fit into registers

 public:
  __device__ Scan(const Arguments& a) : a_(a), site_(a.layer.rows, a.layer.cols), offset_(site_.offset(a.layer.cols)),
                                        p_(parameters_of<N>(a.layer, site_)) {}

  __device__ void run() {
    T carry[N::States], sums[N::Count];
#pragma unroll
    for (int i = 0; i < N::States; i++)
      carry[i] = site_.exists && a_.carry_in[i] ? load<T>(a_.carry_in[i], offset_) : T(0);
#pragma unroll
    for (int p = 0; Learn && p < N::Count; p++)
      sums[p] = site_.exists && a_.grad_parameters[p] ? load<T>(a_.grad_parameters[p], offset_) : T(0);
    for (int64_t last = a_.steps; last > 0; last -= kGroup) {
      Loaded<T> loaded[kGroup];
      // Who is active decides what else is loaded, so the bits of all these steps come first.
#pragma unroll
      for (int k = 0; k < kGroup; k++)
        if (last - k > 0) load_bits(a_.step[last - k], loaded[k]);
#pragma unroll
      for (int k = 0; k < kGroup; k++)
        if (last - k > 0) load_values(last - k, loaded[k]);
#pragma unroll
      for (int k = 0; k < kGroup; k++)
        if (last - k > 0) reverse_step(last - k, loaded[k], carry, sums);
    }
    if (!site_.exists) return;
#pragma unroll
    for (int i = 0; i < N::States; i++)
      if (a_.carry_out[i]) static_cast<T*>(a_.carry_out[i])[offset_] = carry[i];
#pragma unroll
    for (int p = 0; Learn && p < N::Count; p++)
      if (a_.grad_parameters[p]) static_cast<T*>(a_.grad_parameters[p])[offset_] = sums[p];
  }

 private:
  // The gradient that a step's output gets through the recurrence, null if none.
  __device__ const void* recurrent(int64_t step) const { return step == a_.steps ? a_.grad_recurrent : nullptr; }

  __device__ bool differentiable(const Step& step, bool recurrent) const {
    // An output nobody uses sends no gradient at all (not zeros: 0 times an infinite derivative would be NaN).
    const bool wanted = step.grad_output || step.grad_active || recurrent || N::InnerSpikeGradient;
    return N::Spikes && wanted && a_.layer.surrogate.kind != kZeroDerivative;
  }

  __device__ void load_bits(const Step& step, Loaded<T>& to) const {
    to.active = site_.exists && N::Spikes && (!step.active || read_bit(step.active, site_));
    to.spike = (kBefore || N::AdjointUsesSpike) && step.raster && read_bit(step.raster, site_);
    to.reset = (kBefore || N::AdjointUsesReset) && step.reset && read_bit(step.reset, site_);
  }

  __device__ void load_values(int64_t number, Loaded<T>& to) const {
    const Step& step = a_.step[number];
    const void* through = N::Recurrent ? recurrent(number) : nullptr;
    // Without parameter gradients the neurons' adjoints see the gradient of a spike only through its derivative.
    const bool everywhere = site_.exists && (Learn || !N::Spikes || kRefractory<N>);
    to.output = T(0);
    if (step.grad_output && (everywhere || to.active)) to.output = load<T>(step.grad_output, offset_);
    if (through && (everywhere || to.active)) to.output += load<T>(through, offset_);
    if (step.grad_active && to.active) to.output += load<T>(step.grad_active, offset_);
    to.u = T(0);
    const bool derivative = to.active && differentiable(step, through != nullptr);
    if (step.membrane) {
      if (derivative || ((Learn || kRefractory<N>) && site_.exists)) to.u = load<T>(step.membrane, offset_);
    } else if (derivative) {
      to.u = load<T>(step.values, step.offsets[blockIdx.x] + rank_in_block(step.active, site_));
    }
    to.active = derivative;
#pragma unroll
    for (int i = 0; i < N::Traces; i++)
      to.traces[i] = kTraces && step.traces[i] && site_.exists ? load<T>(step.traces[i], offset_) : T(0);
#pragma unroll
    for (int i = 0; i < N::States; i++)
      to.states[i] = step.grad_states[i] && site_.exists ? load<T>(step.grad_states[i], offset_) : T(0);
  }

  __device__ void reverse_step(int64_t step, const Loaded<T>& at, T* carry, T* sums) {
    Site<T> site{at.u, {}, at.spike ? T(1) : T(0), at.reset ? T(1) : T(0)};
#pragma unroll
    for (int i = 0; i < N::Traces; i++) site.trace[i] = at.traces[i];
    Cotangents<T, N::States> g;
    g.output = at.output;
#pragma unroll
    for (int i = 0; i < N::States; i++) g.state[i] = carry[i] + at.states[i];
    T phi = T(0);
    if (at.active) {
      const SnnSurrogate& s = a_.layer.surrogate;
      const T x = Given ? given(a_.step[step]) : N::distance(p_, site);
      const T upstream = N::upstream(p_, site, g);
      if (inside(x, bound<T>(s.low), bound<T>(s.high)))
        visit_surrogate<T>(s, [&](auto derivative) { phi = derivative(x, upstream); });
    }
    T states[N::States] = {};
    if (kBefore && site_.exists) before(step, states);
    Gradients<T, N::States, N::Count> r;
    if constexpr (kRefractory<N>)
      r = N::adjoint(p_, site, states, g, phi, refractory(site, g));
    else
      r = N::adjoint(p_, site, states, g, phi);
    if (site_.exists && a_.grad_input)
      static_cast<T*>(a_.grad_input)[(step - 1) * a_.layer.rows * a_.layer.cols + offset_] = r.input;
#pragma unroll
    for (int i = 0; i < N::States; i++) carry[i] = r.carry[i];
#pragma unroll
    for (int p = 0; Learn && p < N::Count; p++) sums[p] += r.parameters[p];
  }

  // phi of the second threshold comparison, which has no sites where it could be left out.
  __device__ T refractory(const Site<T>& site, const Cotangents<T, N::States>& g) const {
    const SnnSurrogate& s = a_.layer.surrogate;
    const T x = N::refractory_distance(p_, site), upstream = N::refractory_upstream(p_, site, g);
    T phi = T(0);
    if (inside(x, bound<T>(s.low), bound<T>(s.high)))
      visit_surrogate<T>(s, [&](auto derivative) { phi = derivative(x, upstream); });
    return phi;
  }

  // The derivative at this site, where the formula is not one of ours.
  __device__ T given(const Step& step) const {
    return load<T>(step.derivative,
                   step.membrane ? offset_ : step.offsets[blockIdx.x] + rank_in_block(step.active, site_));
  }

  // The states before a step.
  __device__ void before(int64_t step, T* states) const {
    if (step == 1 && a_.state_in[0]) {
#pragma unroll
      for (int i = 0; i < N::States; i++) states[i] = load<T>(a_.state_in[i], offset_);
      return;
    }
    const Step& earlier = a_.step[step - 1];
    Site<T> site{};
    if (earlier.raster && read_bit(earlier.raster, site_)) site.spike = T(1);
    if (earlier.reset && read_bit(earlier.reset, site_)) site.reset = T(1);
    if (earlier.membrane) site.u = load<T>(earlier.membrane, offset_);
#pragma unroll
    for (int i = 0; i < N::Traces; i++)
      if (earlier.traces[i]) site.trace[i] = load<T>(earlier.traces[i], offset_);
    N::left(p_, site, states);
  }

  const Arguments& a_;
  const SiteIndex site_;
  const int64_t offset_;
  const typename N::Parameters p_;
};

template <class N, bool Learn, bool Given>
__global__ void __launch_bounds__(kSitesPerBlock) backward_kernel(const __grid_constant__ Arguments a) {
  Scan<N, Learn, Given>(a).run();
}

Step step_of(const SnnNeuronBackward& a, int64_t step) {
  Step s{};
  s.grad_output = entry(a.grad_output, step);
  s.grad_active = entry(a.grad_active, step);
  for (int i = 0; i < kMaxStates; i++) s.grad_states[i] = entry(a.grad_states[i], step);
  s.values = entry(a.values, step);
  s.membrane = entry(a.membrane, step);
  s.derivative = entry(a.derivative, step);
  for (int i = 0; i < kMaxTraces; i++) s.traces[i] = entry(a.traces[i], step);
  s.raster = entry(a.raster, step);
  s.reset = entry(a.reset, step);
  s.active = entry(a.active, step);
  s.offsets = entry(a.offsets, step);
  return s;
}

template <class N> cudaError_t run(const SnnNeuronBackward& a, cudaStream_t stream) {
  using T = typename N::T;
  const int64_t blocks = blocks_of(a.layer.rows, a.layer.cols);
  bool learn = false;
  for (int p = 0; p < N::Count; p++) learn |= a.grad_parameters[p] != nullptr;
  for (int64_t last = a.steps; last > 0; last -= kStepsPerLaunch) {
    const int64_t first = last < kStepsPerLaunch ? 0 : last - kStepsPerLaunch;
    Arguments chunk{};
    chunk.layer = a.layer;
    chunk.steps = last - first;
    for (int i = 0; i < N::States; i++) {
      chunk.state_in[i] = first || a.earlier ? nullptr : a.state_in[i];
      chunk.carry_in[i] = last < a.steps ? a.carry[i] : a.carry_in[i];
      chunk.carry_out[i] = first ? a.carry[i] : a.grad_state_in[i];
    }
    if (a.grad_input) chunk.grad_input = static_cast<T*>(a.grad_input) + first * a.layer.rows * a.layer.cols;
    for (int p = 0; p < N::Count; p++) chunk.grad_parameters[p] = a.grad_parameters[p];
    if (last == a.steps) chunk.grad_recurrent = a.grad_recurrent;
    for (int64_t k = first || a.earlier ? 0 : 1; k <= chunk.steps; k++) chunk.step[k] = step_of(a, first + k - 1);
    constexpr bool given = !kRefractory<N>;  // nobody has derivatives of two thresholds in a table
    const auto kernel = a.derivative ? backward_kernel<N, true, given>
                        : learn      ? backward_kernel<N, true, false>
                                     : backward_kernel<N, false, false>;
    const cudaError_t error = launch(kernel, blocks, 1, kSitesPerBlock, 0, stream, chunk);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t neuron_backward(const SnnNeuronBackward& a, cudaStream_t stream) {
  return visit_layer(a.layer, [&](auto tag) { return run<typename decltype(tag)::Neuron>(a, stream); });
}

}  // namespace cuda
}  // namespace snn
