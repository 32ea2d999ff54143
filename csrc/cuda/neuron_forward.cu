// Forward scan: one thread a site, its state in registers from step to step, the ballot of a warp is half a raster
// word. Compiled without contraction of multiply and add: membrane and spikes must equal the host library's.
#include "kernels.h"
#include "scan.h"

namespace snn {
namespace cuda {
namespace {

struct Step {
  const void *input, *recurrent;
  void *output, *membrane, *traces[kMaxTraces], *states[kMaxStates];
  uint64_t *raster, *reset, *active;
  int64_t* offsets;
};

// By value, so that a captured launch keeps them.
template <int Steps> struct Arguments {
  SnnLayer layer;
  const void* state_in[kMaxStates];
  void* state_out[kMaxStates];
  void* values;
  int64_t values_capacity;
  SnnReport report;
  int64_t steps;
  Step step[Steps];
};
static_assert(sizeof(Arguments<kStepsPerLaunch>) <= 4096, "larger than the arguments of a kernel may be");

// Appends u of the block's active sites to the values.
template <class T>
__device__ void append(const Step& step, T* values, int64_t capacity, unsigned long long* used, T u, bool active,
                       unsigned bits, int* of_warp, unsigned long long* base) {
  const int total = sum_of_warps(count_bits(bits), of_warp);
  if (threadIdx.x == 0) {
    *base = atomicAdd(used, static_cast<unsigned long long>(total));
    step.offsets[blockIdx.x] = static_cast<int64_t>(*base);
  }
  __syncthreads();
  int64_t place = static_cast<int64_t>(*base) + count_bits(bits & ((1u << threadIdx.x % kWarp) - 1));
  for (int warp = 0; warp < int(threadIdx.x / kWarp); warp++) place += of_warp[warp];
  if (active && place < capacity) values[place] = u;
}

template <class N, int Steps>
__global__ void __launch_bounds__(kSitesPerBlock) forward_kernel(const __grid_constant__ Arguments<Steps> a) {
  using T = typename N::T;
  __shared__ int of_warp[kWarpsPerBlock];
  __shared__ unsigned long long base;
  const SiteIndex site(a.layer.rows, a.layer.cols);
  const int64_t offset = site.offset(a.layer.cols);
  const typename N::Parameters p = parameters_of<N>(a.layer, site);
  const T low = bound<T>(a.layer.surrogate.low), high = bound<T>(a.layer.surrogate.high);
  T state[N::States];
  int spikes = 0, actives = 0;  // of this warp
#pragma unroll
  for (int i = 0; i < N::States; i++) state[i] = site.exists ? load<T>(a.state_in[i], offset) : T(0);
  constexpr int kGroup = Steps < kAhead ? Steps : kAhead, kGiven = kGivenTrace<N>;
  for (int64_t first = 0; first < a.steps; first += kGroup) {
    T input[kGroup], recurrent[kGroup], given[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; k++) {
      const bool exists = first + k < a.steps && site.exists;
      input[k] = exists ? load<T>(a.step[first + k].input, offset) : T(0);
      recurrent[k] = N::Recurrent && exists ? load<T>(a.step[first + k].recurrent, offset) : T(0);
      given[k] = kGiven >= 0 && exists ? load<T>(a.step[first + k].traces[kGiven < 0 ? 0 : kGiven], offset) : T(0);
    }
#pragma unroll
    for (int k = 0; k < kGroup; k++) {
      if (first + k >= a.steps) break;
      const Step& step = a.step[first + k];
      T output;
      const Site<T> s = step_of<N>(p, input[k], recurrent[k], given[k], state, output);
      if (site.exists) {
        if (step.output) static_cast<T*>(step.output)[offset] = output;
        if (step.membrane) static_cast<T*>(step.membrane)[offset] = s.u;
#pragma unroll
        for (int i = 0; i < N::Traces; i++)
          if (step.traces[i] && i != kGiven) static_cast<T*>(step.traces[i])[offset] = s.trace[i];
#pragma unroll
        for (int i = 0; i < N::States; i++)
          if (step.states[i]) static_cast<T*>(step.states[i])[offset] = state[i];
      }
      if (!N::Spikes) continue;
      const unsigned spiking = __ballot_sync(kFull, site.exists && s.spike != T(0));
      spikes += count_bits(spiking);
      if (step.raster) write_bits(step.raster, site, spiking);
      if (step.reset) write_bits(step.reset, site, __ballot_sync(kFull, site.exists && s.reset != T(0)));
      if (!step.active) continue;
      const bool through_mask = kRefractory<N> && s.reset != T(0);  // another gradient of a spike
      const bool active = site.exists && (inside(N::distance(p, s), low, high) || through_mask);
      const unsigned bits = __ballot_sync(kFull, active);
      write_bits(step.active, site, bits);
      if (!a.values)
        actives += count_bits(bits);
      else
        append(step, static_cast<T*>(a.values), a.values_capacity,
               reinterpret_cast<unsigned long long*>(a.report.counts), s.u, active, bits, of_warp, &base);
    }
  }
#pragma unroll
  for (int i = 0; i < N::States; i++)
    if (site.exists) static_cast<T*>(a.state_out[i])[offset] = state[i];
  if (!a.report.counts) return;
  const int active = sum_of_warps(actives, of_warp), spiking = sum_of_warps(spikes, of_warp);
  if (threadIdx.x != 0) return;
  if (active) atomicAdd(reinterpret_cast<unsigned long long*>(a.report.counts), static_cast<unsigned long long>(active));
  report(a.report, spiking);
}

Step step_of(const SnnNeuronForward& a, int64_t step) {
  Step s{};
  s.input = a.input[step];
  s.recurrent = entry(a.recurrent, step);
  s.output = entry(a.output, step);
  s.membrane = entry(a.membrane, step);
  for (int i = 0; i < kMaxTraces; i++) s.traces[i] = entry(a.traces[i], step);
  for (int i = 0; i < kMaxStates; i++) s.states[i] = entry(a.states[i], step);
  s.raster = entry(a.raster, step);
  s.reset = entry(a.reset, step);
  s.active = entry(a.active, step);
  s.offsets = entry(a.offsets, step);
  return s;
}

template <class N, int Steps> cudaError_t launch_steps(const SnnNeuronForward& a, int64_t first, cudaStream_t stream) {
  const int64_t blocks = blocks_of(a.layer.rows, a.layer.cols);
  Arguments<Steps> chunk{};
  chunk.layer = a.layer;
  for (int i = 0; i < N::States; i++) {
    chunk.state_in[i] = first ? a.state_out[i] : a.state_in[i];
    chunk.state_out[i] = a.state_out[i];
  }
  chunk.values = a.values;
  chunk.values_capacity = a.values_capacity;
  chunk.report = a.report;
  chunk.steps = a.steps - first < Steps ? a.steps - first : Steps;
  for (int64_t k = 0; k < chunk.steps; k++) chunk.step[k] = step_of(a, first + k);
  if (first + chunk.steps < a.steps || !reportable(a.report, blocks)) chunk.report.slot = nullptr;
  return launch(forward_kernel<N, Steps>, blocks, 1, kSitesPerBlock, 0, stream, chunk);
}

template <class N> cudaError_t run(const SnnNeuronForward& a, cudaStream_t stream) {
  if (a.steps == 1) return launch_steps<N, 1>(a, 0, stream);
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < a.steps && error == cudaSuccess; first += kStepsPerLaunch)
    error = launch_steps<N, kStepsPerLaunch>(a, first, stream);
  return error;
}

}  // namespace

cudaError_t neuron_forward(const SnnNeuronForward& a, cudaStream_t stream) {
  return visit_layer(a.layer, [&](auto tag) { return run<typename decltype(tag)::Neuron>(a, stream); });
}

}  // namespace cuda
}  // namespace snn
