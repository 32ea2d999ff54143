// Recurrent layers: all steps in one call, the scan of a step and the product of its spikes in turn.
#include <algorithm>

#include "../raster.h"
#include "kernels.h"
#include "pack.h"
#include "parallel.h"

namespace snn {
namespace SSB_ISA {
namespace {

constexpr int64_t kRowsPerTask = 8;

template <class P> void advance(P& table, int64_t steps) {
  if (table) table += steps;
}
const void* advanced(const void* values, int64_t count, int32_t dtype) {
  const int64_t size = dtype == kFloat32 ? 4 : 8;
  return static_cast<const char*>(values) + count * size;
}
void* advanced(void* values, int64_t count, int32_t dtype) {
  return const_cast<void*>(advanced(static_cast<const void*>(values), count, dtype));
}

// One step of a forward scan of several.
SnnNeuronForward step_of(const SnnNeuronForward& scan, int64_t step, int64_t used) {
  SnnNeuronForward one = scan;
  one.steps = 1;
  advance(one.input, step);
  advance(one.output, step);
  advance(one.raster, step);
  advance(one.reset, step);
  advance(one.active, step);
  advance(one.membrane, step);
  advance(one.active_counts, step);
  advance(one.spike_counts, step);
  for (auto& table : one.states) advance(table, step);
  for (auto& table : one.traces) advance(table, step);
  for (int i = 0; step && i < kMaxStates; i++) one.state_in[i] = scan.state_out[i];
  if (one.values) one.values = advanced(one.values, used, scan.layer.dtype);
  one.values_capacity -= used;
  return one;
}

// One step of a backward scan of several.
SnnNeuronBackward step_of(const SnnNeuronBackward& scan, int64_t step) {
  SnnNeuronBackward one = scan;
  one.steps = 1;
  one.earlier = step + scan.earlier;
  advance(one.grad_output, step);
  advance(one.grad_active, step);
  advance(one.raster, step);
  advance(one.reset, step);
  advance(one.active, step);
  advance(one.values, step);
  advance(one.membrane, step);
  advance(one.derivative, step);
  for (auto& table : one.grad_states) advance(table, step);
  for (auto& table : one.traces) advance(table, step);
  one.grad_input = advanced(scan.grad_input, step * scan.layer.rows * scan.layer.cols, scan.layer.dtype);
  return one;
}

// out[row, j] = grad[row, :] . weight[:, j] at the sites j of a row whose bit is set; the others stay as they are.
template <class T>
void gradient_at(const SnnLayer& layer, const void* grad, const T* tiles, const uint64_t* sites, T* out) {
  using P = Pack<T>;
  const int64_t cols = layer.cols, words = words_of(cols), padded = kTile * words;
  const int64_t tasks = (layer.rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(tasks, layer.threads, [&](int64_t task) {
    Buffer<T, 1024> buffer;
    T* row = buffer.room(padded);
    std::fill(row, row + padded, T(0));
    for (int64_t r = task * kRowsPerTask; r < std::min(layer.rows, (task + 1) * kRowsPerTask); r++) {
      std::copy_n(static_cast<const T*>(grad) + r * cols, cols, row);
      for (int64_t w = 0; w < words; w++)
        for_each_bit(sites[r * words + w], [&](int k) {
          const int64_t j = kTile * w + k;
          P sum[4] = {P(T(0)), P(T(0)), P(T(0)), P(T(0))};
          for (int64_t tile = 0; tile < words; tile++) {
            const T *weight = tiles + (tile * cols + j) * kTile, *g = row + tile * kTile;
            for (int lane = 0; lane < kTile; lane += 4 * P::kLanes)
              for (int i = 0; i < 4 && lane + i * P::kLanes < kTile; i++)
                sum[i] = sum[i] + P::load(g + lane + i * P::kLanes) * P::load(weight + lane + i * P::kLanes);
          }
          alignas(64) T lanes[P::kLanes];
          ((sum[0] + sum[1]) + (sum[2] + sum[3])).store(lanes);
          T total = T(0);
          for (const T lane : lanes) total += lane;
          out[r * cols + j] = total;
        });
    }
  });
}

template <class T> int64_t backward(const SnnRecurrentBackward& a) {
  const SnnNeuronBackward& scan = a.scan;
  for (int64_t step = scan.steps - 1; step >= 0; step--) {
    SnnNeuronBackward one = step_of(scan, step);
    if (step < scan.steps - 1) {
      one.grad_recurrent = a.through;
      for (int i = 0; i < kMaxStates; i++) one.carry_in[i] = scan.grad_state_in[i];
    }
    neuron_backward(one);
    if (step)
      gradient_at(scan.layer, one.grad_input, static_cast<const T*>(a.tiles), scan.active[step - 1],
                  static_cast<T*>(a.through));
  }
  return scan.steps;
}

}  // namespace

int64_t recurrent_forward(const SnnRecurrentForward& a) {
  SnnSynapseForward product = a.product;
  product.rows = a.scan.layer.rows;
  product.current = a.current;
  const void* current = a.current;
  int64_t used = 0;
  for (int64_t step = 0; step < a.scan.steps; step++) {
    if (step) {
      product.raster = a.scan.raster[step - 1];
      synapse_forward(product);
    }
    SnnNeuronForward one = step_of(a.scan, step, used);
    one.recurrent = &current;
    if (neuron_forward(one) < 1) return step;
    if (one.active && one.values) used += *one.active_counts;
  }
  return a.scan.steps;
}

int64_t recurrent_backward(const SnnRecurrentBackward& a) {
  return a.scan.layer.dtype == kFloat32 ? backward<float>(a) : backward<double>(a);
}

}  // namespace SSB_ISA
}  // namespace snn
