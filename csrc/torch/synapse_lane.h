// The lane of a synapse (nn.Linear): inputs [rows, inputs], currents [rows, outputs], one time step a call.
#pragma once
#include <ATen/ops/linear.h>

#include <unordered_map>

#include "neuron_lane.h"

namespace {

// Open lanes of synapses whose input no neuron made, by their module. An entry may outlive its node and its module.
std::unordered_map<PyObject*, Owner::Weak> unowned_synapses;

class SynapseLane final : public Lane {
 public:
  ~SynapseLane() override {
    const auto known = unowned_synapses.find(key_);
    if (known == unowned_synapses.end()) return;
    const NodePtr now = known->second.lock();
    if (!now || now.get() == &node_) unowned_synapses.erase(known);
  }

  SynapseLane(SequenceNode& node, const Spec& spec)
      : Lane(/*neuron=*/false), node_(node), module_(spec["module"]), options_(spec["options"]),
        counts_(spec["counts"]), key_(target_of(spec["module"])), neuron_(spec["neuron"]), options_of_(spec["options_of"]),
        owner_(spec.flag("owned")), learns_(spec.tensor("weight").requires_grad()), forward_(spec.address<int64_t(const void*)>("forward_kernel")),
        pack_(spec.address<int64_t(const void*)>("pack_kernel")), weight_(spec.tensor("weight")),
        bias_(spec.tensor("bias")), weight_version_(weight_._version()),
        bias_version_(bias_.defined() ? bias_._version() : 0), type_(weight_.scalar_type()), rows_(spec.integer("rows")),
        threads_(at::get_num_threads()), crossover_(spec.number("crossover")), chunk_ends_(spec.integers("chunk_ends")),
        tiles_(spec.tensor("tiles")), words_(rows_ * ((weight_.size(1) + 63) / 64)),
        rasters_(words_, at::kLong, kFirstSteps, kMostSteps) {
    forward_arguments_.inputs = weight_.size(1);
    forward_arguments_.outputs = weight_.size(0);
    forward_arguments_.rows = rows_;
    forward_arguments_.dtype = type_ == at::kDouble ? kFloat64 : kFloat32;
    forward_arguments_.threads = static_cast<int32_t>(spec.integer("threads"));
    forward_arguments_.tiles = tiles_.defined() ? tiles_.data_ptr() : nullptr;
    forward_arguments_.bias = bias_.defined() ? bias_.data_ptr() : nullptr;
    forward_arguments_.chunk_ends = chunk_ends_.data();
    forward_arguments_.chunks = static_cast<int64_t>(chunk_ends_.size());
    forward_arguments_.apart = spec.integer("apart");
    pack_arguments_.rows = rows_;
    pack_arguments_.cols = pack_arguments_.row_stride = weight_.size(1);
    pack_arguments_.dtype = forward_arguments_.dtype;
    pack_arguments_.threads = 1;
    continue_from(spec);
    if (!owner_) unowned_synapses.insert_or_assign(key_, Owner::Weak(node_.getptr()));
  }

  // After a step that was recorded the long way.
  void continue_from(const Spec& spec) {
    direct_ = spec.flag("direct");
    latest_ = spec.tensor("latest");
    latest_version_ = latest_.defined() ? latest_._version() : 0;
    latest_learns_ = latest_.defined() && latest_.requires_grad();
    latest_storage_ = spec.tensor("latest_raster");
    latest_raster_ = latest_storage_.defined() ? latest_storage_.const_data_ptr<int64_t>() : nullptr;
    latest_ones_ = spec.integer("latest_ones");
    entry_ = spec.integer("entry");
    claimed_ = spec.integer("claimed");
    steps_ = spec.integer("steps");
    repeated_ = at::Tensor();
  }

  // One more step: its current; null without a Python error if it has to go the long way.
  PyObject* step(PyObject* module, const at::Tensor& x, const NeuronLane* before, int64_t block, bool is_view);
  bool continues(PyObject* module) const;
  PyObject* take();

  bool owned() const { return owner_; }
  at::ScalarType type() const { return type_; }
  int64_t claimed() const { return claimed_; }
  void claim(int64_t step) { claimed_ = step; }

 private:
  bool same_values(const at::Tensor& x) const;
  void find_spikes(const at::Tensor& x, const NeuronLane* before, int64_t block);
  at::Tensor current_of(const at::Tensor& x, bool same);

  SequenceNode& node_;
  Owned module_, options_, counts_;  // the module by a weak reference
  PyObject* const key_;              // the module's address, never looked into
  Owned neuron_, options_of_;        // unowned: the neuron it feeds (weak), and how to ask for the options in force for it
  const bool owner_;
  const bool learns_;
  Kernel forward_, pack_;
  SnnSynapseForward forward_arguments_{};
  SnnRasterPack pack_arguments_{};
  at::Tensor weight_, bias_;
  uint32_t weight_version_, bias_version_;
  at::ScalarType type_;
  const int64_t rows_;
  const int threads_;
  const double crossover_;
  std::vector<int64_t> chunk_ends_;
  at::Tensor tiles_;
  const int64_t words_;
  bool direct_ = false;

  at::Tensor latest_;  // input of the last step
  uint32_t latest_version_ = 0;
  bool latest_learns_ = false;
  at::Tensor repeated_;  // an alias of the last current, while the input stays the same
  uint32_t repeated_version_ = 0;
  const int64_t* latest_raster_ = nullptr;  // null: the last input was not one of zeros and ones
  int64_t latest_ones_ = 0;
  at::Tensor latest_storage_;
  int64_t entry_ = 0, claimed_ = -1, steps_ = 0;

  StepArena rasters_;  // of inputs that came without one
  std::vector<const int64_t*> raster_at_;
  Tensors storages_, dense_, movable_;
  std::vector<int64_t> dense_versions_, ones_, entries_, blocks_;
};

bool SynapseLane::continues(PyObject* module) const {
  static PyObject* const parameters = PyUnicode_InternFromString("_parameters");
  static PyObject* const names[] = {PyUnicode_InternFromString("weight"), PyUnicode_InternFromString("bias")};
  if (!node_.is_open() || target_of(module_.object) != module || threads_ != at::get_num_threads()) return false;
  if (!owner_ && claimed_ != steps_ - 1) return false;
  const Ref own(PyObject_GenericGetDict(module, nullptr));
  PyObject* const held = PyDict_GetItem(own.get(), parameters);
  if (!held) return false;
  const at::Tensor* const expected[] = {&weight_, &bias_};
  for (int i = 0; i < 2; ++i) {
    PyObject* found = PyDict_GetItem(held, names[i]);
    if (!found) return false;
    if (found == Py_None ? expected[i]->defined()
                         : !THPVariable_CheckExact(found) || !THPVariable_Unpack(found).is_same(*expected[i]))
      return false;
  }
  return weight_._version() == weight_version_ && (!bias_.defined() || bias_._version() == bias_version_);
}

// Whether an input is that of the step before; as in synapse_steps.py.
bool SynapseLane::same_values(const at::Tensor& x) const {
  if (!latest_.defined() || latest_version_ != x._version() || latest_learns_ != x.requires_grad()) return false;
  if (latest_.is_same(x)) return true;
  return !x.requires_grad() && x.is_view() && latest_.is_view() &&
         x.data_ptr() == latest_.data_ptr() && x.sizes() == latest_.sizes() && x._base().is_same(latest_._base());
}

// Looks up or makes the raster of an input.
void SynapseLane::find_spikes(const at::Tensor& x, const NeuronLane* before, int64_t block) {
  if (before) {
    latest_raster_ = reinterpret_cast<const int64_t*>(before->raster_of(block));
    latest_ones_ = before->spikes_of(block);
    latest_storage_ = before->raster_storage_of(block);
    return;
  }
  auto* words = reinterpret_cast<int64_t*>(rasters_.take());
  pack_arguments_.dense = x.data_ptr();
  pack_arguments_.words = reinterpret_cast<uint64_t*>(words);
  latest_ones_ = run_kernel(*this, pack_, &pack_arguments_, x.numel());
  latest_raster_ = latest_ones_ < 0 ? nullptr : words;
  latest_storage_ = rasters_.storages.back();
  if (!latest_raster_) rasters_.untake();
}

at::Tensor SynapseLane::current_of(const at::Tensor& x, bool same) {
  if (same && repeated_.defined() && repeated_._version() == repeated_version_) {
    at::Tensor copy = empty(repeated_.sizes(), type_);
    std::memcpy(copy.data_ptr(), repeated_.data_ptr(), repeated_.nbytes());
    return copy;
  }
  at::Tensor current;
  const double sites = static_cast<double>(x.numel());
  if (latest_raster_ && tiles_.defined() && static_cast<double>(latest_ones_) <= crossover_ * sites) {
    current = empty({rows_, weight_.size(0)}, type_);
    forward_arguments_.raster = reinterpret_cast<const uint64_t*>(latest_raster_);
    forward_arguments_.current = current.data_ptr();
    run_kernel(*this, forward_, &forward_arguments_, current.numel());
    add_count(counts_.object, "forward_sparse");
  } else {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    current = at::linear(x, weight_, bias_.defined() ? std::optional<at::Tensor>(bias_) : std::nullopt);
    if (current.is_view()) current = current.clone();
  }
  if (same) {
    const auto& counter = current.unsafeGetTensorImpl()->version_counter();
    repeated_ = at::Tensor(current.unsafeGetTensorImpl()->shallow_copy_and_detach(counter, true));
    repeated_version_ = current._version();
  }
  return current;
}

PyObject* SynapseLane::step(PyObject* module, const at::Tensor& x, const NeuronLane* before, int64_t block,
                            bool is_view) {
  if (!continues(module)) return nullptr;
  if (before) {
    if (before->options() != options_.object || (direct_ && is_view)) return nullptr;
  } else {
    PyObject* neuron = nullptr;
    if (PyWeakref_GetRef(neuron_.object, &neuron) < 0) throw_python_error();
    if (!neuron) return nullptr;
    const Ref owned(neuron), options(PyObject_CallOneArg(options_of_.object, neuron));
    if (options.get() != options_.object) return nullptr;
  }
  if (x.dim() != 2 || x.size(0) != rows_ || x.size(1) != weight_.size(1)) return nullptr;
  if (weight_.requires_grad() != learns_ || !(learns_ || x.requires_grad())) return nullptr;
  Edge edge = x.requires_grad() ? impl::gradient_edge(x) : Edge();
  if (!node_.admits(edge)) return nullptr;
  const NodePtr self = node_.getptr();
  const bool same = same_values(x);
  if (!same) {
    find_spikes(x, before, block);
    ++entry_;
    repeated_ = at::Tensor();
  }
  const at::Tensor current = current_of(x, same);
  node_.append_input(std::move(edge));
  node_.begin_outputs();
  node_.append_output(self, current, Role::plain);
  raster_at_.push_back(latest_raster_);
  ones_.push_back(latest_ones_);
  if (latest_raster_ && (storages_.empty() || !storages_.back().is_same(latest_storage_)))
    storages_.push_back(latest_storage_);
  entries_.push_back(entry_);
  if (latest_raster_) {
    dense_.emplace_back();
    dense_versions_.push_back(0);
  } else {
    const auto& counter = x.unsafeGetTensorImpl()->version_counter();
    dense_.emplace_back(x.unsafeGetTensorImpl()->shallow_copy_and_detach(counter, true));
    dense_versions_.push_back(x._version());
  }
  movable_.push_back(!owner_ && x.requires_grad() ? x : at::Tensor());
  blocks_.push_back(block);
  if (!owner_) {  // nobody gives the same spikes twice, and they would be kept
    latest_ = x;
    latest_version_ = x._version();
    latest_learns_ = x.requires_grad();
  }
  ++steps_;
  add_count(counts_.object, "synapse_steps");
  add_count(counts_.object, "lane_steps");
  return THPVariable_Wrap(current);
}

PyObject* SynapseLane::take() {
  const Ref taken(PyDict_New());
  put(taken, "steps", PyLong_FromSize_t(entries_.size()));
  put(taken, "direct", PyBool_FromLong(direct_));
  put(taken, "raster", as_bytes(raster_at_));
  put(taken, "rasters", as_list(storages_));
  put(taken, "dense", as_list(dense_));
  put(taken, "dense_versions", as_bytes(dense_versions_));
  put(taken, "movable", as_list(movable_));
  put(taken, "ones", as_bytes(ones_));
  put(taken, "entries", as_bytes(entries_));
  put(taken, "blocks", as_bytes(blocks_));
  raster_at_.clear();
  storages_.clear();
  dense_.clear();
  dense_versions_.clear();
  movable_.clear();
  ones_.clear();
  entries_.clear();
  blocks_.clear();
  rasters_.share();
  return Py_NewRef(taken.get());
}

// ---- the two together -----------------------------------------------------------------------------------------------
SequenceNode* sequence_of(const at::Tensor& tensor) {
  Node* node = impl::grad_fn_unsafe(tensor);
  return node && typeid(*node) == typeid(SequenceNode) ? static_cast<SequenceNode*>(node) : nullptr;
}

template <class L> L* lane_of(SequenceNode* node) {
  constexpr bool neuron = std::is_same_v<L, NeuronLane>;
  return node && node->lane && node->lane->is_neuron == neuron ? static_cast<L*>(node->lane.get()) : nullptr;
}

PyObject* NeuronLane::step(PyObject* module, PyObject* options, PyObject* input, PyObject* const* states) {
  if (options != options_.object || target_of(module_.object) != module || !node_.is_open()) return nullptr;
  const at::Tensor* x = ordinary(input, type_);
  if (!x || x->sizes() != shape_ || x->requires_grad() != input_attached_ || !is_last(states)) return nullptr;
  if (!ordinary_mode() || !guard_.holds(module)) return nullptr;
  SequenceNode* from = sequence_of(*x);
  SynapseLane* synapse = lane_of<SynapseLane>(from);
  if (from != feeder_ || (from && from->lane && !synapse)) return nullptr;
  Edge edge = x->requires_grad() ? impl::gradient_edge(*x) : Edge();
  if (!node_.admits(edge)) return nullptr;

  const NodePtr self = node_.getptr();
  Tensors made;
  for (int i = 0; i < states_; ++i) made.push_back(empty(shape_, type_));
  made.insert(made.begin(), spikes_ ? empty(shape_, type_) : made[0]);
  run(*x, states, made);
  record();
  if (synapse && !synapse->owned()) synapse->claim(x->output_nr());
  if (from && !synapse) from->claimed = x->output_nr();
  if (from) sources_.push_back(x->output_nr());
  const size_t first = node_.num_inputs();
  node_.append_input(std::move(edge));
  node_.begin_outputs();
  for (const Output& output : outputs_) node_.append_output(self, made[output.tensor], output.role);
  locate_last(first);
  add_count(counts_.object, "neuron_steps");
  add_count(counts_.object, "lane_steps");

  const Ref results(PyTuple_New(1 + given()));
  for (int i = 0; i <= states_; ++i) {
    const bool shared = i == 1 && !spikes_;  // the membrane of an integrator is its output
    PyObject* tensor = shared ? Py_NewRef(PyTuple_GET_ITEM(results.get(), 0)) : THPVariable_Wrap(made[i]);
    if (!tensor) throw_python_error();
    PyTuple_SET_ITEM(results.get(), i, tensor);
  }
  if (recurrent_) PyTuple_SET_ITEM(results.get(), 1 + states_, Py_NewRef(PyTuple_GET_ITEM(results.get(), 0)));
  return Py_NewRef(results.get());
}

// The spikes that a lane recorded: where a tensor, or the base of a view that keeps its rows, is one of its outputs.
struct Origin {
  NeuronLane* lane = nullptr;
  int64_t block = -1;
  bool is_view = false, unknown = false;  // unknown: a sequence made it, but not its lane
};
Origin origin_of(const at::Tensor& tensor) {
  Origin found;
  const at::Tensor* made = &tensor;
  at::Tensor base;
  if (tensor.is_view()) {
    base = tensor._base();
    if (base.numel() != tensor.numel() || !tensor.is_contiguous()) return found;
    found.is_view = true;
    made = &base;
  }
  SequenceNode* node = sequence_of(*made);
  if (!node) return found;
  NeuronLane* lane = lane_of<NeuronLane>(node);
  if (!node->lane || (lane && !lane->recorded(made->output_nr()))) {
    found.unknown = true;
  } else if (lane && tensor._version() == 0) {
    found.block = lane->block_of(made->output_nr());
    found.lane = found.block < 0 ? nullptr : lane;
  }
  return found;
}

}  // namespace
