// snn_sparse_node: the sequence node as a Python module. See `functions` at the end for what it offers.
#include "sequence_node.h"
#include "synapse_lane.h"

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME snn_sparse_node
#endif

namespace {

// ---- arguments ------------------------------------------------------------------------------------------------------
Tensors unpack_tensors(PyObject* sequence, const char* role, bool none_allowed = false) {
  Tensors tensors;
  if (!sequence) return tensors;
  const Ref items(PySequence_Fast(sequence, "inputs, outputs and states must be sequences of tensors"));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.get()); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(items.get(), i);
    const bool absent = none_allowed && item == Py_None;
    TORCH_CHECK_TYPE(absent || THPVariable_Check(item), role, " ", i, ": expected a tensor, got ",
                     Py_TYPE(item)->tp_name);
    tensors.push_back(absent ? at::Tensor() : THPVariable_Unpack(item));
  }
  return tensors;
}

// Refuses tensors whose derivatives somebody else tracks: gradients would be silently wrong.
void check_plain(const at::Tensor& tensor, const char* role) {
  using Key = c10::DispatchKey;
  const auto keys = tensor.unsafeGetTensorImpl()->key_set();
  TORCH_CHECK_NOT_IMPLEMENTED(!keys.has(Key::FuncTorchBatched) && !keys.has(Key::FuncTorchGradWrapper), role,
                              ": torch.func transforms (vmap, grad, jvp, ...) are not supported");
  TORCH_CHECK_NOT_IMPLEMENTED(!keys.has(Key::Python) && !keys.has(Key::Functionalize), role,
                              ": tensor subclasses, fake and functional tensors are not supported");
  TORCH_CHECK_NOT_IMPLEMENTED(!isFwGradDefined(tensor), role, ": forward-mode AD is not supported");
}

// A hook stays with the node it was registered on; so a tensor that has one cannot move.
void check_movable(const at::Tensor& tensor) {
  TORCH_CHECK(!tensor.is_leaf(), "output: a leaf that requires grad cannot become the output of a node");
  any_observer(*tensor.grad_fn(), [own = static_cast<size_t>(tensor.output_nr())](size_t output, const char* what) {
    TORCH_CHECK(output != own && output != kSomeOutput, "output: ", what, " it, so it cannot move to another node "
                "(has_requests() of its node tells beforehand)");
    return false;
  });
}

void check_outputs(const Tensors& outputs, bool repoint) {
  for (const auto& tensor : outputs) {
    check_plain(tensor, "output");
    TORCH_CHECK(!tensor.is_inference(), "output: an inference tensor cannot carry gradients; leave inference_mode()");
    TORCH_CHECK(isDifferentiableType(tensor.scalar_type()), "output: must be floating point");
    TORCH_CHECK(!tensor.is_view(), "output: must not be a view, whose history an edit of its base would rewrite");
    TORCH_CHECK(repoint || !tensor.requires_grad(), "output: has a history already");
    if (tensor.requires_grad()) check_movable(tensor);
  }
}

// One step as Python gave it. Building it checks everything, so that nothing fails half way through recording it.
struct Step {
  edge_list edges;
  Tensors outputs, states, ends;

  Step(PyObject* in, PyObject* out, PyObject* carried, PyObject* last, bool repoint)
      : outputs(unpack_tensors(out, "output")), states(unpack_tensors(carried, "state")),
        ends(unpack_tensors(last, "end")) {
    for (const auto& tensor : unpack_tensors(in, "input", /*none_allowed=*/true)) {
      if (tensor.defined()) check_plain(tensor, "input");
      edges.push_back(tensor.defined() && tensor.requires_grad() ? impl::gradient_edge(tensor) : Edge());
    }
    check_outputs(outputs, repoint);
    check_outputs(states, repoint);
    check_outputs(ends, repoint);
  }

  void record(SequenceNode& node, const NodePtr& self) {
    for (auto& edge : edges) node.append_input(std::move(edge));
    record_outputs(node, self);
  }

  void record_outputs(SequenceNode& node, const NodePtr& self) const {
    node.begin_outputs();
    for (const auto& tensor : outputs) node.append_output(self, tensor, Role::plain);
    for (const auto& tensor : states) node.append_output(self, tensor, Role::state);
    for (const auto& tensor : ends) node.append_output(self, tensor, Role::end);
  }

  // The dict of hooks removed meanwhile is tied to the old node: the next hook must make a new one.
  void forget_removed_hooks() const {
    for (const auto* tensors : {&outputs, &states, &ends})
      for (const auto& tensor : *tensors)
        if (PyObject_SetAttrString(Ref(THPVariable_Wrap(tensor)).get(), "_backward_hooks", Py_None) < 0)
          throw_python_error();
  }
};

// Asked at every step: only views would need more than this raw look, and they are never our outputs.
SequenceNode* node_of(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a tensor, got ", Py_TYPE(object)->tp_name);
  return sequence_of(THPVariable_Unpack(object));
}

// ---- Handle ---------------------------------------------------------------------------------------------------------
struct Handle {
  PyObject_HEAD
  Owner::Weak node;  // weak: the tape may hold handles, and no garbage collector sees through a node
};
PyTypeObject* handle_type = nullptr;

struct Locked {  // the node behind a handle, kept alive while it is looked at
  explicit Locked(PyObject* handle) : owner(reinterpret_cast<Handle*>(handle)->node.lock()) {}
  explicit operator bool() const { return owner.get() != nullptr; }
  SequenceNode* operator->() const { return static_cast<SequenceNode*>(owner.get()); }
  SequenceNode& get() const { return static_cast<SequenceNode&>(*owner); }
  NodePtr owner;
};

PyObject* make_handle(const NodePtr& node) {
  Ref handle(handle_type->tp_alloc(handle_type, 0));
  new (&reinterpret_cast<Handle*>(handle.get())->node) Owner::Weak(node);
  return handle.release();
}

void handle_dealloc(PyObject* self) {
  using Weak = Owner::Weak;
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<Handle*>(self)->node.~Weak();
  type->tp_free(self);
  Py_DECREF(type);
}

// A copy of a module must not share the node of the original, and a pickle cannot hold one.
PyObject* handle_reduce(PyObject*, PyObject*) {
  return Py_BuildValue("O()", reinterpret_cast<PyObject*>(Py_TYPE(Py_None)));
}

// autograd counts backwards: what the forward steps read are the node's outputs, what they make are its inputs.
PyGetSetDef handle_attributes[] = {
    {"tape", [](PyObject* self, void*) { Locked n(self); return Py_NewRef(n && n->tape ? n->tape : Py_None); },
     nullptr, "The tape, or None once it was given up.", nullptr},
    {"open", [](PyObject* self, void*) { Locked n(self); return PyBool_FromLong(n && n->is_open()); },
     nullptr, "Whether the node may still grow here.", nullptr},
    {"alive", [](PyObject* self, void*) { return PyBool_FromLong(static_cast<bool>(Locked(self))); },
     nullptr, "Whether the node still exists.", nullptr},
    {"num_inputs", [](PyObject* self, void*) { Locked n(self); return PyLong_FromSize_t(n ? n->num_outputs() : 0); },
     nullptr, "Number of input edges.", nullptr},
    {"num_outputs", [](PyObject* self, void*) { Locked n(self); return PyLong_FromSize_t(n ? n->num_inputs() : 0); },
     nullptr, "Number of output tensors, states included.", nullptr},
    {"topological_nr",
     [](PyObject* self, void*) { Locked n(self); return PyLong_FromSize_t(n ? n->topological_nr() : 0); },
     nullptr, "Inputs that join must have a lower one.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyMethodDef handle_methods[] = {{"__reduce__", handle_reduce, METH_NOARGS, "Copies and pickles become None."},
                                {nullptr, nullptr, 0, nullptr}};
PyType_Slot handle_slots[] = {{Py_tp_doc, const_cast<char*>("A weak reference to a sequence node.")},
                              {Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)},
                              {Py_tp_getset, handle_attributes},
                              {Py_tp_methods, handle_methods},
                              {0, nullptr}};
PyType_Spec handle_spec = {"snn_sparse_node.Handle", sizeof(Handle), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, handle_slots};

#include "lane_functions.h"

// ---- the module -----------------------------------------------------------------------------------------------------
PyObject* create(PyObject*, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  static const char* names[] = {"tape", "inputs", "outputs", "states", "ends", "name", "slack", "repoint", nullptr};
  PyObject *tape, *inputs, *outputs, *states = nullptr, *ends = nullptr;
  const char* name = "SequenceBackward";
  unsigned long long slack = 0;
  int repoint = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|OO$sKp:create", const_cast<char**>(names), &tape, &inputs,
                                   &outputs, &states, &ends, &name, &slack, &repoint))
    return nullptr;
  TORCH_CHECK_TYPE(PyCallable_Check(tape), "create: the tape must be callable, got ", Py_TYPE(tape)->tp_name);
  Step step(inputs, outputs, states, ends, repoint);
  if (repoint) step.forget_removed_hooks();
  const NodePtr node = Owner::make<SequenceNode>(tape, name, std::move(step.edges), slack);
  step.record_outputs(static_cast<SequenceNode&>(*node), node);
  return make_handle(node);
  END_HANDLE_TH_ERRORS
}

PyObject* extend(PyObject*, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  static const char* names[] = {"handle", "inputs", "outputs", "states", "ends", nullptr};
  PyObject *handle, *inputs, *outputs, *states = nullptr, *ends = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OO|OO:extend", const_cast<char**>(names), handle_type, &handle,
                                   &inputs, &outputs, &states, &ends))
    return nullptr;
  const Locked node(handle);
  if (!node || !node->is_open()) Py_RETURN_FALSE;
  Step step(inputs, outputs, states, ends, /*repoint=*/false);
  for (const auto& edge : step.edges)
    if (!node->admits(edge)) Py_RETURN_FALSE;
  step.record(node.get(), node.owner);
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyObject* tape_of(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  const SequenceNode* node = node_of(tensor);
  return Py_NewRef(node && node->is_open() ? node->tape : Py_None);
  END_HANDLE_TH_ERRORS
}

PyObject* handle_of(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  if (!node_of(tensor)) Py_RETURN_NONE;
  return make_handle(THPVariable_Unpack(tensor).grad_fn());
  END_HANDLE_TH_ERRORS
}

PyObject* has_requests(PyObject*, PyObject* handle) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(Py_TYPE(handle) == handle_type, "expected a Handle, got ", Py_TYPE(handle)->tp_name);
  const Locked node(handle);
  return PyBool_FromLong(!node || node->has_requests());
  END_HANDLE_TH_ERRORS
}

PyObject* sole_owner(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(THPVariable_Check(tensor), "expected a tensor, got ", Py_TYPE(tensor)->tp_name);
  return PyBool_FromLong(THPVariable_Unpack(tensor).storage().use_count() == 1);
  END_HANDLE_TH_ERRORS
}

PyObject* task_id(PyObject*, PyObject*) { return PyLong_FromLong(get_current_graph_task_id()); }

PyCFunction with_keywords(PyCFunctionWithKeywords function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
PyCFunction with_fastcall(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
PyMethodDef functions[] = {
    {"create", with_keywords(create), METH_VARARGS | METH_KEYWORDS,
     "create(tape, inputs, outputs, states=(), ends=(), *, name='SequenceBackward', slack=0, repoint=False) -> Handle\n\n"
     "A new node: outputs, then states, then ends become its outputs. States are those from which the fused computation\n"
     "goes on inside: a request for their gradient is refused. Ends become states once a step follows. slack leaves room for inputs that lie deeper in the graph.\n"
     "repoint moves outputs that have a history already to the new node."},
    {"extend", with_keywords(extend), METH_VARARGS | METH_KEYWORDS,
     "extend(handle, inputs, outputs, states=(), ends=()) -> bool\n\n"
     "One more step of an open node. False: nothing was changed, a new node is needed."},
    {"tape_of", tape_of, METH_O,
     "tape_of(tensor) -> tape | None\n\nThe tape of the open sequence node the tensor came from."},
    {"handle_of", handle_of, METH_O, "handle_of(tensor) -> Handle | None\n\nThe sequence node the tensor came from."},
    {"has_requests", has_requests, METH_O,
     "has_requests(handle) -> bool\n\n"
     "Whether anybody else looks at the gradient of any output: hooks, retain_grad, autograd.grad, or a graph that is\n"
     "being recorded (create_graph). If not, gradients may bypass the engine. True for a dead node."},
    {"arm_neuron", arm<NeuronLane>, METH_VARARGS, "arm_neuron(handle, description)\n\n"
     "Gives a node the lane of a neuron, or tells the lane to go on from the step that was recorded last."},
    {"arm_synapse", arm<SynapseLane>, METH_VARARGS, "arm_synapse(handle, description)\n\n"
     "The same for a synapse; description['owner'] is the handle of the neuron whose spikes it receives, or None."},
    {"take", take, METH_O, "take(handle) -> dict | None\n\nWhat the lane recorded since it was asked last; None if there is no lane any more."},
    {"is_last", is_last, METH_VARARGS, "is_last(handle, states) -> bool\n\n"
     "Whether these are the states that a neuron's lane, or the step before it, returned, untouched."},
    {"claimed", claimed, METH_VARARGS, "claimed(handle, [step]) -> int\n\n"
     "The last step of a layer between neurons whose output a neuron consumed, after setting it."},
    {"spikes_at", spikes_at, METH_O, "spikes_at(tensor) -> (tape, block) | None\n\n"
     "The neuron's block whose spikes, recorded by a lane, this tensor is."},
    {"neuron_step", with_fastcall(neuron_step), METH_FASTCALL,
     "neuron_step(module, options, input, *states) -> (output, *states) | None\n\n"
     "One time step by the lane of a neuron; None: the step has to go the long way."},
    {"synapse_step", with_fastcall(synapse_step), METH_FASTCALL, "synapse_step(module, input) -> current | None\n\n"
     "One time step by the lane of a synapse; None: it has to go the long way."},
    {"sole_owner", sole_owner, METH_O,
     "sole_owner(tensor) -> bool\n\nWhether no other tensor has the memory of this one."},
    {"task_id", task_id, METH_NOARGS, "task_id() -> int\n\nThe number of the running backward pass, -1 outside."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "snn_sparse_node", "An autograd node that grows with a time loop.",
                          -1, functions, nullptr, nullptr, nullptr, nullptr};
}  // namespace

#define SNN_PASTE(a, b) a##b
#define SNN_INIT(name) SNN_PASTE(PyInit_, name)
extern "C" __attribute__((visibility("default"))) PyObject* SNN_INIT(TORCH_EXTENSION_NAME)() {
  handle_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&handle_spec));
  PyObject* module = handle_type ? PyModule_Create(&definition) : nullptr;
  if (module && PyModule_AddObjectRef(module, "Handle", reinterpret_cast<PyObject*>(handle_type)) < 0)
    Py_CLEAR(module);
  return module;
}
