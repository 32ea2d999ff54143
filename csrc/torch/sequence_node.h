// The sequence node: an autograd node that grows while the user's time loop runs.
//
// One node stands for all time steps of a layer. It owns a Python *tape*, which records the steps and
// computes all gradients in one call: tape(grads of the outputs, needs of the inputs) -> grads of the inputs.
// One source for torch 2.6 to 2.15: the plain C API of Python, no pybind11 and no torch/extension.h.
#pragma once
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
// What records further steps of a sequence without Python, see lanes.h. Destroyed with the GIL held.
struct Lane {
  explicit Lane(bool neuron) : is_neuron(neuron) {}
  virtual ~Lane() = default;
  const bool is_neuron;  // else of a synapse
  bool busy = false;     // a kernel runs for it without the GIL: it has to live on
};

// The part of a node that owns the tape and the lane, and gives them up in time.
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
    if (!tape) return;
    if (!Py_IsInitialized() || Py_IsFinalizing()) {
      lane.release();  // its references to Python objects cannot be given back any more
      return;
    }
    Gil gil;
    PyObject *type, *value, *traceback;  // an error on its way to the user must survive a node that dies meanwhile
    PyErr_Fetch(&type, &value, &traceback);
    if (lane && !lane->busy) lane.reset();
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
  std::unique_ptr<Lane> lane;
};

// True while a tape runs for create_graph=True: it runs without grad mode and could not tell by itself.
thread_local bool recording_graph = false;

// plain: nothing is computed from it inside. state: the fused computation goes on from it. end: it will, once a step follows.
enum class Role { plain, state, end };

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
  void append_input(Edge&& edge) { next_edges_.push_back(std::move(edge)); }

  // Before the outputs of a step are added: what ended the sequence so far goes on inside.
  void begin_outputs() {
    if (!guard) {
      auto owned = std::make_unique<OutputGuard>(*this);
      guard = owned.get();
      add_tensor_pre_hook(std::move(owned));
    }
    guard->states.insert(guard->states.end(), guard->ends.begin(), guard->ends.end());
    guard->ends.clear();
  }

  void append_output(const NodePtr& self, const at::Tensor& tensor, Role role) {
    if (role == Role::state) guard->states.push_back(num_inputs());
    if (role == Role::end) guard->ends.push_back(num_inputs());
    set_history(tensor, self);
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
  int64_t claimed = -1;         // of a layer without a lane: the last output that a neuron consumed
  OutputGuard* guard = nullptr;  // owned by the node's hooks; made with the first output
};

}  // namespace
