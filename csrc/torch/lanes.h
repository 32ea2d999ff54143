// What lanes have in common. A lane carries a per-step loop on without Python: once the tape has recorded a first step
// the long way, the lane records the following ones, as long as nothing differs from that step. Whatever it does not
// expect, it declines before anything has changed, and the step goes the long way again.
//
// A lane belongs to the node of its sequence and dies with it; the tape takes its records over when it needs them. It
// holds no output of its node and no module, as that would be a cycle that no garbage collector sees.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

#include "../abi.h"
#include "sequence_node.h"

namespace {

using Kernel = int64_t (*)(const void*);  // of the core, by address

// Below this many sites a kernel is over before another thread could have taken the GIL.
constexpr int64_t kSitesToReleaseGil = 32768;

int64_t run_kernel(Lane& lane, Kernel kernel, const void* arguments, int64_t sites) {
  lane.busy = true;
  PyThreadState* saved = sites >= kSitesToReleaseGil ? PyEval_SaveThread() : nullptr;
  const int64_t result = kernel(arguments);
  if (saved) PyEval_RestoreThread(saved);
  lane.busy = false;
  TORCH_CHECK_WITH(OutOfMemoryError, result != kOutOfMemory, "a kernel cannot allocate its working memory");
  return result;
}

// None of torch's global modes under which the host library's own code has to run (compat/torch_modes.py has the same
// list, with reasons).
bool ordinary_mode() {
  using Key = c10::DispatchKey;
  using c10::impl::tls_is_dispatch_key_excluded;
  using c10::impl::tls_is_dispatch_key_included;
  return GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
         tls_is_dispatch_key_excluded(Key::AutocastCPU) && !tls_is_dispatch_key_included(Key::Tracer) &&
         !tls_is_dispatch_key_included(Key::FuncTorchDynamicLayerFrontMode) &&
         !tls_is_dispatch_key_included(Key::Python) && at::SavedTensorDefaultHooks::get_tls_state().stack.empty() &&
         !ForwardADLevel::try_get_by_idx(0);
}

// A contiguous CPU tensor without anything special about it, of this type.
bool is_ordinary(const at::Tensor& tensor, at::ScalarType type) {
  const auto keys = tensor.unsafeGetTensorImpl()->key_set();
  return tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.scalar_type() == type &&
         tensor.is_contiguous() && !tensor.is_inference() && !keys.has(c10::DispatchKey::Negative) &&
         !keys.has(c10::DispatchKey::FuncTorchBatched) && !keys.has(c10::DispatchKey::FuncTorchGradWrapper);
}

const at::Tensor* ordinary(PyObject* object, at::ScalarType type) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return is_ordinary(tensor, type) ? &tensor : nullptr;
}

at::Tensor empty(at::IntArrayRef shape, at::ScalarType type) {
  return at::Tensor(at::detail::empty_cpu(shape, type));
}

// ---- what Python says about a lane ----------------------------------------------------------------------------------
// The description of a lane: a dict. A missing entry is an error of ours.
struct Spec {
  PyObject* dict;
  PyObject* operator[](const char* name) const {
    PyObject* value = PyDict_GetItemString(dict, name);
    TORCH_CHECK(value, "lane: no ", name);
    return value;
  }
  bool flag(const char* name) const { return PyObject_IsTrue((*this)[name]) == 1; }
  int64_t integer(const char* name) const {
    const int64_t value = PyLong_AsLongLong((*this)[name]);
    if (value == -1 && PyErr_Occurred()) throw_python_error();
    return value;
  }
  double number(const char* name) const { return PyFloat_AsDouble((*this)[name]); }
  template <class T> T* address(const char* name) const { return reinterpret_cast<T*>(integer(name)); }
  at::Tensor tensor(const char* name) const {
    PyObject* value = (*this)[name];
    return value == Py_None ? at::Tensor() : at::Tensor(THPVariable_Unpack(value));
  }
  std::vector<int64_t> integers(const char* name) const {
    const Ref items(PySequence_Fast((*this)[name], "lane: expected a sequence of integers"));
    std::vector<int64_t> found;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.get()); ++i)
      found.push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.get(), i)));
    return found;
  }
};

struct Owned {  // a strong reference, or null
  PyObject* object = nullptr;
  Owned() = default;
  explicit Owned(PyObject* borrowed) : object(Py_XNewRef(borrowed)) {}
  Owned(Owned&& other) noexcept : object(std::exchange(other.object, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(object, other.object);
    return *this;
  }
  ~Owned() { Py_XDECREF(object); }
};

// The object that a weak reference names, or null; only to be compared with others.
PyObject* target_of(PyObject* weak) {
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(weak, &found) < 0) throw_python_error();
  Py_XDECREF(found);
  return found;
}

// What must not have changed about a module since the tape looked at its settings, as a list of tuples:
// ("attribute", name, object), ("method", name, function), ("parameter", name, tensor), ("tensor", tensor),
// ("cell", cell, content), ("part", module, name, tensor): a parameter of a module inside. Parameters may be buffers.
class Guard {
 public:
  explicit Guard(PyObject* list) {
    const Ref items(PySequence_Fast(list, "lane: the guard must be a sequence"));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.get()); ++i)
      checks_.emplace_back(PySequence_Fast_GET_ITEM(items.get(), i));
  }

  bool holds(PyObject* module) const {
    const Ref own(PyObject_GenericGetDict(module, nullptr));
    static PyObject* const parameters = PyUnicode_InternFromString("_parameters");
    static PyObject* const buffers = PyUnicode_InternFromString("_buffers");
    static PyObject* const modules = PyUnicode_InternFromString("_modules");
    PyObject* const places[] = {PyDict_GetItem(own.get(), parameters), PyDict_GetItem(own.get(), buffers),
                                PyDict_GetItem(own.get(), modules)};
    for (const Check& check : checks_)
      if (!check.holds(module, own.get(), places)) return false;
    return true;
  }

 private:
  enum class Kind { attribute, method, parameter, tensor, cell, part };
  struct Check {
    Kind kind;
    Owned name, object, part;
    at::Tensor tensor;
    uint32_t version = 0;
    bool requires_grad = false;

    explicit Check(PyObject* tuple) {
      static const char* const names[] = {"attribute", "method", "parameter", "tensor", "cell", "part"};
      const char* given = PyUnicode_AsUTF8(PyTuple_GetItem(tuple, 0));
      const auto found = std::find(std::begin(names), std::end(names), std::string(given ? given : ""));
      TORCH_CHECK(found != std::end(names), "lane: unknown check");
      kind = static_cast<Kind>(found - std::begin(names));
      PyObject* last = PyTuple_GetItem(tuple, PyTuple_Size(tuple) - 1);
      object = Owned(last);
      if (kind != Kind::tensor) name = Owned(PyTuple_GetItem(tuple, 1));
      if (kind == Kind::part) part = Owned(PyTuple_GetItem(tuple, 2));
      if (kind == Kind::tensor || kind == Kind::parameter || kind == Kind::part) {
        tensor = THPVariable_Unpack(last);
        version = tensor._version();
        requires_grad = tensor.requires_grad();
      }
    }

    // Whether the module inside still has the very same parameter.
    bool same_part(PyObject* modules) const {
      PyObject* inner = modules ? PyDict_GetItem(modules, name.object) : nullptr;
      if (!inner) return false;
      const Ref own(PyObject_GenericGetDict(inner, nullptr));
      static PyObject* const parameters = PyUnicode_InternFromString("_parameters");
      PyObject* held = PyDict_GetItem(own.get(), parameters);
      return held && PyDict_GetItem(held, part.object) == object.object;
    }

    bool holds(PyObject* module, PyObject* own, PyObject* const* places) const {
      PyObject* found = nullptr;
      switch (kind) {
        case Kind::attribute:
          found = PyDict_GetItem(own, name.object);
          return (found ? found : Py_None) == object.object;
        case Kind::method:
          found = PyDict_GetItem(own, name.object);
          return found && PyMethod_Check(found) && PyMethod_GET_FUNCTION(found) == object.object &&
                 PyMethod_GET_SELF(found) == module;
        case Kind::cell: {
          const Ref content(PyObject_GetAttrString(name.object, "cell_contents"));
          return content.get() == object.object;
        }
        case Kind::part:
          if (!same_part(places[2])) return false;
          return tensor._version() == version && tensor.requires_grad() == requires_grad;
        case Kind::parameter:
          for (int i = 0; i < 2 && !found; ++i)
            if (places[i]) found = PyDict_GetItem(places[i], name.object);
          if (found != object.object) return false;
          [[fallthrough]];
        case Kind::tensor:
          return tensor._version() == version && tensor.requires_grad() == requires_grad;
      }
      return false;
    }
  };
  std::vector<Check> checks_;
};

// ---- records --------------------------------------------------------------------------------------------------------
// Memory for something of fixed size a step, some steps at a time.
class StepArena {
 public:
  StepArena(int64_t elements, at::ScalarType type, int64_t first_steps, int64_t most_steps)
      : elements_(elements), type_(type), next_(first_steps), most_(most_steps) {}

  char* take() {
    if (used_ == room_) {
      room_ = std::exchange(next_, most_);
      used_ = 0;
      storages.push_back(empty({room_, elements_}, type_));
    }
    return static_cast<char*>(storages.back().data_ptr()) +
           used_++ * elements_ * static_cast<int64_t>(c10::elementSize(type_));
  }
  void untake() { --used_; }  // what was taken last
  // The storages so far become somebody else's; the rest of the last one still serves.
  Tensors share() {
    Tensors shared = storages;
    if (!storages.empty()) storages.erase(storages.begin(), storages.end() - 1);
    return shared;
  }

  Tensors storages;

 private:
  int64_t elements_;
  at::ScalarType type_;
  int64_t next_, most_, used_ = 0, room_ = 0;
};

PyObject* as_bytes(const void* data, size_t bytes) {
  return PyBytes_FromStringAndSize(static_cast<const char*>(data), static_cast<Py_ssize_t>(bytes));
}
template <class T> PyObject* as_bytes(const std::vector<T>& values) {
  return as_bytes(values.data(), values.size() * sizeof(T));
}
PyObject* as_list(const Tensors& tensors) {
  Ref list(PyList_New(static_cast<Py_ssize_t>(tensors.size())));
  for (size_t i = 0; i < tensors.size(); ++i)
    PyList_SET_ITEM(list.get(), i, tensors[i].defined() ? Ref(THPVariable_Wrap(tensors[i])).release() : Py_NewRef(Py_None));
  return list.release();
}
void put(const Ref& dict, const char* name, PyObject* value) {
  const Ref owned(value);
  if (PyDict_SetItemString(dict.get(), name, owned.get()) < 0) throw_python_error();
}

// Adds to a count of snn_sparse_backend.counts.
void add_count(PyObject* counts, const char* name) {
  PyObject* before = PyDict_GetItemString(counts, name);
  const Ref after(PyLong_FromLong(before ? PyLong_AsLong(before) + 1 : 1));
  if (PyDict_SetItemString(counts, name, after.get()) < 0) throw_python_error();
}

}  // namespace
