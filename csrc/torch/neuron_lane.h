// The lane of a neuron layer: one time step [B, ...] a call, by the CPU's forward scan.
#pragma once
#include "lanes.h"

namespace {

// From this density of active sites on, the dense membrane is stored instead of compressed values; as in stores.py.
constexpr double kStoreDenseAbove = 0.3;
constexpr int64_t kFirstSteps = 7, kMostSteps = 32;  // of an arena of rasters; with the first step as in raster.py

// Membranes of the active sites, step behind step. Filled to the brim: what a step may need at worst is only needed in
// the scratch memory that the scan writes to.
class ValueArena {
 public:
  explicit ValueArena(at::ScalarType type) : type_(type) {}

  void append(const char* values, int64_t count) {
    const int64_t size = static_cast<int64_t>(c10::elementSize(type_));
    if (runs.empty() || used_ + count > runs.back().storage.numel()) {
      close();
      runs.push_back({empty({std::max<int64_t>(count * kMostSteps, 64)}, type_), {}});
    }
    Run& run = runs.back();
    std::memcpy(static_cast<char*>(run.storage.data_ptr()) + used_ * size, values, count * size);
    run.places.push_back(used_ * size);
    used_ += count;
  }
  // Gives back what the last run does not use.
  void close() {
    if (!runs.empty() && used_ < runs.back().storage.numel()) {
      at::Tensor exact = empty({used_}, type_);
      std::memcpy(exact.data_ptr(), runs.back().storage.data_ptr(), used_ * c10::elementSize(type_));
      runs.back().storage = exact;
    }
    used_ = 0;
  }

  struct Run {
    at::Tensor storage;
    std::vector<int64_t> places;  // in bytes, one a step
  };
  std::vector<Run> runs;

 private:
  at::ScalarType type_;
  int64_t used_ = 0;
};

// Working memory of a scan for the values of one step. Of the thread: the GIL may be free meanwhile.
char* value_scratch(size_t bytes) {
  static thread_local std::vector<char> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory.data();
}

class NeuronLane final : public Lane {
 public:
  NeuronLane(SequenceNode& node, const Spec& spec)
      : Lane(/*neuron=*/true), node_(node), module_(spec["module"]), options_(spec["options"]), guard_(spec["guard"]),
        counts_(spec["counts"]), kernel_(spec.address<int64_t(const void*)>("kernel")),
        arguments_(*spec.address<const SnnNeuronForward>("arguments")), shape_(spec.integers("shape")),
        type_(spec.flag("double") ? at::kDouble : at::kFloat), states_(static_cast<int>(spec.integer("states"))),
        recurrent_(spec.flag("recurrent")), spikes_(spec.flag("spikes")), late_reset_(spec.flag("late_reset")), keep_active_(spec.flag("keep_active")),
        keep_membrane_(spec.flag("keep_membrane")), keep_traces_(spec.integers("keep_traces")),
        unit_spikes_(spec.flag("unit_spikes")), words_(arguments_.layer.rows * ((arguments_.layer.cols + 63) / 64)),
        sites_(arguments_.layer.rows * arguments_.layer.cols), raster_(words_, at::kLong, kFirstSteps, kMostSteps),
        active_(words_, at::kLong, kFirstSteps, kMostSteps), reset_(words_, at::kLong, kFirstSteps, kMostSteps),
        membrane_(sites_, type_, std::min(kFirstSteps, dense_steps()), dense_steps()),
        values_(type_) {
    for (size_t i = 0; i < keep_traces_.size(); ++i) {
      traces_.emplace_back(sites_, type_, std::min(kFirstSteps, dense_steps()), dense_steps());
      trace_tables_.emplace_back();
    }
    SnnNeuronForward& a = arguments_;
    a.steps = 1;
    a.input = &slots_.input;
    a.output = &slots_.output;
    a.raster = &slots_.raster;
    a.reset = &slots_.reset;
    a.active = &slots_.active;
    a.membrane = &slots_.membrane;
    for (int i = 0; i < kMaxTraces; ++i) a.traces[i] = &slots_.traces[i];
    for (int i = 0; i < kMaxStates; ++i) a.states[i] = nullptr;
    a.active_counts = &slots_.active_count;
    a.spike_counts = &slots_.spike_count;
    a.scratch = nullptr;
    a.recurrent = &slots_.recurrent;
    if (recurrent_) {
      multiply_ = spec.address<int64_t(const void*)>("multiply");
      product_ = *spec.address<const SnnSynapseForward>("product");
      recurrent_current_ = empty({sites_}, type_);
      product_.rows = a.layer.rows;
      product_.current = recurrent_current_.data_ptr();
      product_.threads = a.layer.threads;
      slots_.recurrent = product_.current;
    }
    continue_from(spec);
  }

  // After a step that was recorded the long way: the lane goes on from its outputs.
  void continue_from(const Spec& spec) {
    outputs_.clear();
    for (int64_t packed : spec.integers("outputs")) outputs_.push_back({static_cast<int>(packed / 4), Role(packed % 4)});
    input_attached_ = spec.flag("input_attached");
    dense_ = spec.flag("dense");
    product_.raster = spec.address<const uint64_t>("last_raster");
    first_block_ = next_block_ = spec.integer("next_block");
    first_output_ = node_.num_inputs();
    locate_last(first_output_ - outputs_.size());
    feeder_ = nullptr;
    const at::Tensor x = spec.tensor("fed");  // an output of the layer that feeds this neuron
    if (x.defined()) feeder_ = impl::grad_fn_unsafe(x);
  }

  bool is_last(PyObject* const* states) const {
    for (int i = 0; i < given(); ++i) {
      if (!THPVariable_CheckExact(states[i])) return false;
      const auto* variable = reinterpret_cast<const THPVariable*>(states[i]);
      const at::Tensor& state = THPVariable_Unpack(states[i]);
      if (impl::grad_fn_unsafe(state) != &node_ || state.output_nr() != last_[i] || state._version() != 0) return false;
      if (variable->backward_hooks && PyObject_IsTrue(variable->backward_hooks) != 0) return false;
      if (state.retains_grad() || !is_ordinary(state, type_) || state.sizes() != shape_) return false;
    }
    return true;
  }

  // One more step: a tuple of the output and the states; null without a Python error if it has to go the long way.
  PyObject* step(PyObject* module, PyObject* options, PyObject* input, PyObject* const* states);

  // Whether it was the lane that recorded an output, rather than the long way.
  bool recorded(size_t output) const { return output >= first_output_; }
  // The block that made an output, -1 if that is no tensor of ordinary spikes.
  int64_t block_of(size_t output) const {
    if (!spikes_ || !unit_spikes_ || outputs_.empty()) return -1;
    const size_t place = output - first_output_;
    if (outputs_[place % outputs_.size()].tensor != 0) return -1;
    return first_block_ + static_cast<int64_t>(place / outputs_.size());
  }
  const uint64_t* raster_of(int64_t block) const { return rasters_[block - first_block_]; }
  int64_t spikes_of(int64_t block) const { return spike_counts_[block - first_block_]; }
  const at::Tensor& raster_storage_of(int64_t block) const { return raster_storages_[block - first_block_]; }

  // Everything recorded since the lane was asked last.
  PyObject* take();

  // The synapses these spikes feed.
  void add_synapse(PyObject* module, const NodePtr& node) {
    for (auto& [known, weak] : synapses_)
      if (known == module) {
        weak = Owner::Weak(node);
        return;
      }
    synapses_.emplace_back(module, Owner::Weak(node));
  }
  NodePtr synapse(PyObject* module) const {
    for (const auto& [known, weak] : synapses_)
      if (known == module) return weak.lock();
    return NodePtr();
  }

  SequenceNode& node() const { return node_; }
  // How many states a step is given: those of the scan, and the spikes before it if they drive it.
  int given() const { return states_ + recurrent_; }
  PyObject* options() const { return options_.object; }

 private:
  struct Output {
    int tensor;  // 0: the output, 1 + i: a state
    Role role;
  };
  struct Slots {
    const void *input = nullptr, *recurrent = nullptr;
    void* output = nullptr;
    uint64_t *raster = nullptr, *reset = nullptr, *active = nullptr;
    void *membrane = nullptr, *traces[kMaxTraces] = {};
    int64_t active_count = 0, spike_count = 0;
  };

  int64_t dense_steps() const {
    return std::clamp<int64_t>(65536 / std::max<int64_t>(sites_ * static_cast<int64_t>(c10::elementSize(type_)), 1), 1, kMostSteps);
  }
  void locate_last(size_t first) {
    last_.assign(given(), static_cast<uint32_t>(-1));
    for (size_t k = 0; k < outputs_.size(); ++k)
      for (int i = 0; i < states_; ++i)
        if (outputs_[k].tensor == 1 + i || (!spikes_ && i == 0 && outputs_[k].tensor == 0))
          last_[i] = static_cast<uint32_t>(first + k);
    for (size_t k = 0; recurrent_ && k < outputs_.size(); ++k)
      if (outputs_[k].tensor == 0) last_[states_] = static_cast<uint32_t>(first + k);
  }
  void run(const at::Tensor& x, PyObject* const* states, const Tensors& made);
  void record();

  SequenceNode& node_;
  Owned module_;  // a weak reference
  Owned options_;
  Guard guard_;
  Owned counts_;
  Kernel kernel_;
  SnnNeuronForward arguments_;
  Slots slots_;
  std::vector<int64_t> shape_;
  at::ScalarType type_;
  const int states_;
  const bool recurrent_, spikes_, late_reset_, keep_active_, keep_membrane_;
  const std::vector<int64_t> keep_traces_;  // of each trace of the model, whether it is wanted
  const bool unit_spikes_;
  const int64_t words_, sites_;
  bool input_attached_ = true, dense_ = false;
  std::vector<Output> outputs_;  // of each step, in the order in which the node has them
  std::vector<uint32_t> last_;   // node outputs that are the states after the last step
  Kernel multiply_ = nullptr;    // of a recurrent layer: the product of the spikes before a step
  SnnSynapseForward product_{};
  at::Tensor recurrent_current_;
  size_t first_output_ = 0;
  int64_t first_block_ = 0, next_block_ = 0;
  Node* feeder_ = nullptr;  // kept alive by the node's edges
  std::vector<std::pair<PyObject*, Owner::Weak>> synapses_;

  StepArena raster_, active_, reset_, membrane_;
  std::vector<StepArena> traces_;
  ValueArena values_;
  std::vector<uint64_t*> rasters_, actives_, resets_;
  Tensors raster_storages_;
  std::vector<void*> membranes_;
  std::vector<std::vector<void*>> trace_tables_;
  std::vector<int64_t> spike_counts_, active_counts_, sources_;
};

void NeuronLane::run(const at::Tensor& x, PyObject* const* states, const Tensors& made) {
  if (recurrent_) run_kernel(*this, multiply_, &product_, sites_);
  slots_.input = x.data_ptr();
  for (int i = 0; i < states_; ++i) {
    arguments_.state_in[i] = THPVariable_Unpack(states[i]).data_ptr();
    arguments_.state_out[i] = made[1 + i].data_ptr();
  }
  slots_.output = spikes_ ? made[0].data_ptr() : nullptr;
  slots_.raster = spikes_ ? reinterpret_cast<uint64_t*>(raster_.take()) : nullptr;
  slots_.active = spikes_ && keep_active_ ? reinterpret_cast<uint64_t*>(active_.take()) : nullptr;
  slots_.reset = spikes_ && late_reset_ ? reinterpret_cast<uint64_t*>(reset_.take()) : nullptr;
  const bool membrane = keep_membrane_ || (slots_.active && dense_);
  slots_.membrane = membrane ? membrane_.take() : nullptr;
  for (size_t i = 0; i < traces_.size(); ++i) slots_.traces[i] = keep_traces_[i] ? traces_[i].take() : nullptr;
  // The scan wants room for every site twice: to write to, and to move to.
  const int64_t room = 64 * words_;
  const size_t size = c10::elementSize(type_);
  char* scratch = slots_.active ? value_scratch(2 * room * size) : nullptr;
  arguments_.scratch = scratch;
  arguments_.values = slots_.active && !membrane ? scratch + room * size : nullptr;
  arguments_.values_capacity = room;
  slots_.active_count = slots_.spike_count = 0;
  run_kernel(*this, kernel_, &arguments_, sites_);
}

void NeuronLane::record() {
  rasters_.push_back(slots_.raster);
  product_.raster = slots_.raster;
  raster_storages_.push_back(spikes_ ? raster_.storages.back() : at::Tensor());
  actives_.push_back(slots_.active);
  resets_.push_back(slots_.reset);
  membranes_.push_back(slots_.membrane);
  for (size_t i = 0; i < traces_.size(); ++i) trace_tables_[i].push_back(slots_.traces[i]);
  spike_counts_.push_back(slots_.spike_count);
  active_counts_.push_back(slots_.active_count);
  if (arguments_.values) values_.append(static_cast<const char*>(arguments_.values), slots_.active_count);
  dense_ |= slots_.active && static_cast<double>(slots_.active_count) > kStoreDenseAbove * static_cast<double>(sites_);
  ++next_block_;
}

PyObject* NeuronLane::take() {
  const Ref taken(PyDict_New());
  const size_t steps = rasters_.size();
  put(taken, "steps", PyLong_FromSize_t(steps));
  put(taken, "dense", PyBool_FromLong(dense_));
  put(taken, "raster", as_bytes(rasters_));
  put(taken, "reset", as_bytes(resets_));
  put(taken, "active", as_bytes(actives_));
  put(taken, "membrane", as_bytes(membranes_));
  put(taken, "spike_counts", as_bytes(spike_counts_));
  put(taken, "active_counts", as_bytes(active_counts_));
  put(taken, "sources", as_bytes(sources_));
  put(taken, "fed", PyBool_FromLong(feeder_ != nullptr));
  put(taken, "rasters", as_list(raster_.share()));
  put(taken, "actives", as_list(active_.share()));
  put(taken, "resets", as_list(reset_.share()));
  put(taken, "membranes", as_list(membrane_.share()));
  const Ref traces(PyList_New(0));
  for (size_t i = 0; i < traces_.size(); ++i) {
    put(taken, ("trace " + std::to_string(i)).c_str(), as_bytes(trace_tables_[i]));
    const Ref storages(as_list(traces_[i].share()));
    if (PyList_Append(traces.get(), storages.get()) < 0) throw_python_error();
    trace_tables_[i].clear();
  }
  put(taken, "traces", Py_NewRef(traces.get()));
  values_.close();
  const Ref values(PyList_New(0));
  for (const auto& run : values_.runs) {
    const Ref storage(THPVariable_Wrap(run.storage)), places(as_bytes(run.places));
    const Ref pair(PyTuple_Pack(2, storage.get(), places.get()));
    if (PyList_Append(values.get(), pair.get()) < 0) throw_python_error();
  }
  put(taken, "values", Py_NewRef(values.get()));
  values_ = ValueArena(type_);
  rasters_.clear();
  raster_storages_.clear();
  actives_.clear();
  resets_.clear();
  membranes_.clear();
  spike_counts_.clear();
  active_counts_.clear();
  sources_.clear();
  first_block_ = next_block_;
  first_output_ = node_.num_inputs();
  return Py_NewRef(taken.get());
}

}  // namespace
