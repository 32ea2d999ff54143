// snn_sparse_node: an autograd node that grows while the user's time loop runs.
//
// One "sequence node" stands for all time steps of a layer. It owns a Python *tape*, which records the steps and
// computes all gradients in one call: tape(grads of the outputs, needs of the inputs) -> grads of the inputs.
// One source for torch 2.6 to 2.15: the plain C API of Python, no pybind11 and no torch/extension.h.
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <c10/util/Type.h>
#include <torch/csrc/autograd/cpp_hook.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_hook.h>
#include <torch/csrc/utils/pythoncapi_compat.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME snn_sparse_node
#endif

namespace {
using namespace torch::autograd;
using Tensors = std::vector<at::Tensor>;

// ---- torch versions -------------------------------------------------------------------------------------------------
// Nodes are owned by std::shared_ptr up to torch 2.12 and by c10::intrusive_ptr from 2.13 on.
using NodePtr = decltype(Edge::function);

// Node::release_resources(), what ends with the last owner, came with the intrusive pointers.
template <class N> auto release_resources_of(N& node, int) -> decltype(node.N::release_resources()) {
  node.N::release_resources();
}
template <class N> void release_resources_of(N&, long) {}

template <class Pointer> struct Ownership;
template <class T> struct Ownership<std::shared_ptr<T>> {
  using Weak = std::weak_ptr<T>;
  template <class N, class... Args> static std::shared_ptr<T> make(Args&&... args) {
    return std::shared_ptr<T>(new N(std::forward<Args>(args)...), [](T* node) {
      release_resources_of(static_cast<N&>(*node), 0);
      deleteNode(node);  // unrolls the recursion that would overflow the stack at the end of a long chain
    });
  }
};
template <class T> struct Ownership<c10::intrusive_ptr<T>> {
  using Weak = c10::weak_intrusive_ptr<T>;
  template <class N, class... Args> static c10::intrusive_ptr<T> make(Args&&... args) {
    return c10::make_intrusive<N>(std::forward<Args>(args)...);
  }
};
using Owner = Ownership<NodePtr>;

// ---- Python ---------------------------------------------------------------------------------------------------------
struct Gil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Gil() { PyGILState_Release(state); }
};

[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

struct Ref {  // an owned reference; a null pointer becomes the Python error it stands for
  PyObject* object;
  explicit Ref(PyObject* object) : object(object) {
    if (!object) throw_python_error();
  }
  ~Ref() { Py_XDECREF(object); }
  Ref(const Ref&) = delete;
  PyObject* get() const { return object; }
  PyObject* release() { return std::exchange(object, nullptr); }
};

// ---- who looks at the gradients of a node's outputs -----------------------------------------------------------------
// Refuses every request for a gradient of which autograd sees only a part, and gives hooks on outputs that received no
// gradient zeros instead of None (stock would not call them at all). It is the first hook to run when the engine arrives
// at its node, also if the engine only collects a gradient there without executing the node.
struct OutputGuard final : FunctionPreHook {
  explicit OutputGuard(Node& node) : node(node) {}
  variable_list operator()(const variable_list& grads) override;
  Node& node;                  // which owns this hook
  std::vector<size_t> states;  // outputs from which the fused computation goes on inside, ascending
  std::vector<size_t> ends;    // states of the last step: the computation goes on from them once a step follows
  Tensors filled;              // the zeros given to hooks; still undefined for the tape unless a hook replaced them
};

constexpr size_t kSomeOutput = static_cast<size_t>(-1);

// The hook classes are not exported from libtorch_python: dynamic_cast would compile, but not load.
template <class Hook, class Base> const Hook* hook_as(const Base& hook, const char* name) {
  return c10::demangle(typeid(hook).name()) == name ? static_cast<const Hook*>(&hook) : nullptr;
}

// Python hooks that were removed again leave an empty dict behind. Hooks of another kind count as used.
template <class Hook> bool in_use(const Hook* python_hook) {
  Gil gil;
  return !python_hook || !PyDict_Check(python_hook->dict) || PyDict_Size(python_hook->dict) > 0;
}

// Calls visit(output, what) for each observer of one output, until a visit returns true.
template <class Visit> bool any_observer(Node& node, Visit visit) {
  for (const auto& pointer : node.tensor_pre_hooks()) {
    const FunctionPreHook& hook = *pointer;
    if (typeid(hook) == typeid(OutputGuard)) continue;
    const auto* python = hook_as<PyFunctionTensorPreHook>(hook, "torch::autograd::PyFunctionTensorPreHook");
    const auto* cpp = hook_as<CppFunctionTensorPreHook>(hook, "torch::autograd::CppFunctionTensorPreHook");
    const size_t output = python ? python->value_idx : cpp ? cpp->value_idx_ : kSomeOutput;
    if (in_use(python) && visit(output, "register_hook() was called on")) return true;
  }
  for (const auto& [output, hook] : node.retains_grad_hooks())
    if (hook && visit(output, "retain_grad() was called on")) return true;
  if (const auto* tasks = get_current_graph_task_exec_info()) {
    const auto entry = tasks->find(&node);
    if (entry != tasks->end() && entry->second.captures_)
      for (const auto& capture : *entry->second.captures_)
        if (visit(static_cast<size_t>(capture.input_idx_), "a gradient was asked for with respect to")) return true;
  }
  return false;
}

// Hooks on the node itself see the gradients of all its outputs.
bool has_node_hooks(Node& node) {
  for (const auto& hook : node.pre_hooks())
    if (in_use(hook_as<PyFunctionPreHook>(*hook, "torch::autograd::PyFunctionPreHook"))) return true;
  for (const auto& hook : node.post_hooks())
    if (in_use(hook_as<PyFunctionPostHook>(*hook, "torch::autograd::PyFunctionPostHook"))) return true;
  return false;
}

variable_list OutputGuard::operator()(const variable_list& grads) {
  any_observer(node, [this](size_t output, const char* what) {
    const bool harmless = output != kSomeOutput && !std::binary_search(states.begin(), states.end(), output);
    TORCH_CHECK(harmless, node.name(), ": ", what, " output ", static_cast<int64_t>(output), ", a membrane state "
                "or what is computed from it. The gradient at this state is carried inside the fused node from step to "
                "step, and autograd would show only a part of it. Use `enable(..., fuse_steps=False)`.");
    return false;
  });
  variable_list complete = grads;
  filled.clear();
  for (const auto& pointer : node.tensor_pre_hooks()) {
    const auto* hook = hook_as<PyFunctionTensorPreHook>(*pointer, "torch::autograd::PyFunctionTensorPreHook");
    if (!hook || !in_use(hook) || complete[hook->value_idx].defined()) continue;
    filled.push_back(node.input_metadata(hook->value_idx).zeros_like());
    complete[hook->value_idx] = filled.back();
  }
  return complete;
}

// ---- the node -------------------------------------------------------------------------------------------------------
// The part of a node that owns the tape and gives it up in time.
struct TapeOwner : Node {
  TapeOwner(PyObject* tape, edge_list&& edges) : Node(std::move(edges)), tape(Py_NewRef(tape)) {}
  ~TapeOwner() { drop_tape(/*announce=*/false); }

  // An override from torch 2.13 on: a weak handle keeps the node's memory, but must not keep the tape.
  void release_resources() {
    drop_tape(/*announce=*/false);
    release_resources_of<Node>(*this, 0);
  }

  // announce: call the tape's release(), so that the recorded data go even if somebody else holds the tape.
  void drop_tape(bool announce) {
    if (!tape || !Py_IsInitialized() || Py_IsFinalizing()) return;
    Gil gil;
    PyObject *type, *value, *traceback;  // an error on its way to the user must survive a node that dies meanwhile
    PyErr_Fetch(&type, &value, &traceback);
    PyObject* dropped = std::exchange(tape, nullptr);
    if (dropped && announce) call_release(dropped);
    Py_XDECREF(dropped);
    PyErr_Restore(type, value, traceback);
  }

  static void call_release(PyObject* tape) {
    PyObject* method = PyObject_GetAttrString(tape, "release");
    if (!method && PyErr_ExceptionMatches(PyExc_AttributeError)) return PyErr_Clear();
    PyObject* result = method ? PyObject_CallObject(method, nullptr) : nullptr;
    if (!result) PyErr_WriteUnraisable(tape);  // not an error of backward, whose gradients are right
    Py_XDECREF(result);
    Py_XDECREF(method);
  }

  PyObject* tape;  // null once given up
};

// True while a tape runs for create_graph=True: it runs without grad mode and could not tell by itself.
thread_local bool recording_graph = false;

struct SequenceNode final : TapeOwner {
  SequenceNode(PyObject* tape, const char* name, edge_list&& edges, uint64_t slack)
      : TapeOwner(tape, std::move(edges)), label(name), graph_task(get_current_graph_task_id()) {
    topological_nr_ += slack;  // any larger number is as valid, and leaves room for deeper inputs
  }

  std::string name() const override { return label; }
  void release_variables() override { drop_tape(/*announce=*/true); }

  // A graph must not grow while the engine runs it, so a node belongs to the graph task it was made in.
  bool is_open() const { return tape && graph_task == get_current_graph_task_id(); }

  // Edges to lower numbers only: that rules out cycles, and the engine prunes by these numbers.
  bool admits(const Edge& edge) const { return !edge.function || edge.function->topological_nr() < topological_nr(); }

  // Not add_next_edge(), which would refuse: the node has consumers already.
  void append_inputs(edge_list&& edges) { std::move(edges.begin(), edges.end(), std::back_inserter(next_edges_)); }

  void append_outputs(const NodePtr& self, const Tensors& outputs, const Tensors& states, const Tensors& ends) {
    if (!guard) {
      auto owned = std::make_unique<OutputGuard>(*this);
      guard = owned.get();
      add_tensor_pre_hook(std::move(owned));
    }
    guard->states.insert(guard->states.end(), guard->ends.begin(), guard->ends.end());
    guard->ends.clear();
    for (const auto& tensor : outputs) set_history(tensor, self);
    for (const auto& tensor : states) {
      guard->states.push_back(num_inputs());
      set_history(tensor, self);
    }
    for (const auto& tensor : ends) {
      guard->ends.push_back(num_inputs());
      set_history(tensor, self);
    }
  }

  bool has_requests() {
    return recording_graph || has_node_hooks(*this) || any_observer(*this, [](size_t, const char*) { return true; });
  }

  variable_list apply(variable_list&& grads) override {
    Gil gil;
    TORCH_CHECK(tape, "Trying to backward through the graph a second time: what ", label, " recorded was freed by the "
                "first backward. Specify retain_graph=True if you need to backward through the graph a second time.");
    const bool create_graph = GradMode::is_enabled();
    const AutoGradMode no_grad(false);
    variable_list results = call_tape(grads, create_graph);
    if (create_graph) forbid_second_order(results, grads);
    return results;
  }

  bool is_filled(const at::Tensor& grad) const {
    if (!guard) return false;
    return std::any_of(guard->filled.begin(), guard->filled.end(), [&](const at::Tensor& t) { return t.is_same(grad); });
  }

  variable_list call_tape(const variable_list& grads, bool create_graph) {
    const size_t inputs = num_outputs();
    const Ref callback(Py_NewRef(tape)), given(PyTuple_New(grads.size())), needs(PyTuple_New(inputs));
    for (size_t i = 0; i < grads.size(); ++i) {
      const bool arrived = grads[i].defined() && !is_filled(grads[i]);
      PyObject* grad = arrived ? Ref(THPVariable_Wrap(grads[i])).release() : Py_NewRef(Py_None);
      PyTuple_SET_ITEM(given.get(), i, grad);
    }
    for (size_t i = 0; i < inputs; ++i)
      PyTuple_SET_ITEM(needs.get(), i, PyBool_FromLong(task_should_compute_output(i)));

    const bool outer = std::exchange(recording_graph, create_graph);
    PyObject* answer = PyObject_CallFunctionObjArgs(callback.get(), given.get(), needs.get(), nullptr);
    recording_graph = outer;

    const Ref returned(answer), items(PySequence_Fast(answer, "a tape must return a sequence of gradients"));
    const size_t count = PySequence_Fast_GET_SIZE(items.get());
    TORCH_CHECK(count == inputs, label, ": the tape returned ", count, " gradients for ", inputs, " inputs");
    variable_list results(inputs);
    for (size_t i = 0; i < inputs; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(items.get(), i);
      if (item == Py_None) continue;
      TORCH_CHECK_TYPE(THPVariable_Check(item), label, ": gradient ", i, " is a ", Py_TYPE(item)->tp_name,
                       ", not a tensor");
      results[i] = THPVariable_Unpack(item);
    }
    return results;
  }

  // The failing node hangs on everything the results depend on; else autograd.grad would prune it and see zeros.
  void forbid_second_order(variable_list& results, const variable_list& grads) {
    edge_list causes;
    for (const auto& grad : grads)
      if (grad.defined() && grad.requires_grad()) causes.push_back(impl::gradient_edge(grad));
    for (const auto& edge : next_edges_)
      if (edge.is_valid()) causes.push_back(edge);
    const NodePtr error = Owner::make<Error>(
        label + " does not support double backward: the gradients that create_graph=True gave are right, but cannot be "
                "differentiated again. Disable the sparse backend for this model to do so.", std::move(causes));
    for (auto& result : results) {
      if (!result.defined()) continue;
      result = result.detach();
      set_history(result, error);
    }
  }

  std::string label;
  int graph_task;               // -1 in an ordinary forward pass
  OutputGuard* guard = nullptr;  // owned by the node's hooks; made with the first output
};

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

  // The dict of hooks removed meanwhile is tied to the old node: the next hook must make a new one.
  void forget_removed_hooks() const {
    for (const auto* tensors : {&outputs, &states, &ends})
      for (const auto& tensor : *tensors)
        if (PyObject_SetAttrString(Ref(THPVariable_Wrap(tensor)).get(), "_backward_hooks", Py_None) < 0)
          throw_python_error();
  }
};

// The sequence node a tensor came from, or null. Asked at every step: only views would need more than this raw look,
// and they are never our outputs.
SequenceNode* node_of(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a tensor, got ", Py_TYPE(object)->tp_name);
  Node* node = impl::grad_fn_unsafe(THPVariable_Unpack(object));
  return node && typeid(*node) == typeid(SequenceNode) ? static_cast<SequenceNode*>(node) : nullptr;
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
  static_cast<SequenceNode&>(*node).append_outputs(node, step.outputs, step.states, step.ends);
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
  node->append_inputs(std::move(step.edges));
  node->append_outputs(node.owner, step.outputs, step.states, step.ends);
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

PyObject* task_id(PyObject*, PyObject*) { return PyLong_FromLong(get_current_graph_task_id()); }

PyCFunction with_keywords(PyCFunctionWithKeywords function) {
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
