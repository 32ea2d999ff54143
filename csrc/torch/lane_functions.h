// What Python does with lanes. Included by sequence_node.cpp, behind what it defines of handles.
#pragma once

namespace {

template <class L> PyObject* arm(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *handle, *description;
  if (!PyArg_ParseTuple(args, "O!O!:arm", handle_type, &handle, &PyDict_Type, &description)) return nullptr;
  const Locked node(handle);
  TORCH_CHECK(node && node->tape, "arm: the node was given up");
  const Spec spec{description};
  if (L* lane = lane_of<L>(&node.get())) {
    lane->continue_from(spec);
    Py_RETURN_NONE;
  }
  node->lane = std::make_unique<L>(node.get(), spec);
  if constexpr (std::is_same_v<L, SynapseLane>) {
    if (PyObject* owner = spec["owner"]; owner != Py_None) {
      const Locked before(owner);
      if (NeuronLane* neuron = before ? lane_of<NeuronLane>(&before.get()) : nullptr)
        neuron->add_synapse(target_of(spec["module"]), node.owner);
    }
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* take(PyObject*, PyObject* handle) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(Py_TYPE(handle) == handle_type, "expected a Handle, got ", Py_TYPE(handle)->tp_name);
  const Locked node(handle);
  if (!node || !node->lane) Py_RETURN_NONE;
  if (NeuronLane* lane = lane_of<NeuronLane>(&node.get())) return lane->take();
  return lane_of<SynapseLane>(&node.get())->take();
  END_HANDLE_TH_ERRORS
}

PyObject* is_last(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *handle, *states;
  if (!PyArg_ParseTuple(args, "O!O:is_last", handle_type, &handle, &states)) return nullptr;
  const Locked node(handle);
  const NeuronLane* lane = node ? lane_of<NeuronLane>(&node.get()) : nullptr;
  TORCH_CHECK(lane, "is_last: the node has no lane of a neuron");
  const Ref items(PySequence_Fast(states, "is_last: the states must be a sequence"));
  return PyBool_FromLong(lane->is_last(PySequence_Fast_ITEMS(items.get())));
  END_HANDLE_TH_ERRORS
}

PyObject* claimed(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject* handle;
  long long step = -1;
  if (!PyArg_ParseTuple(args, "O!|L:claimed", handle_type, &handle, &step)) return nullptr;
  const Locked node(handle);
  if (!node) return PyLong_FromLong(-1);
  SynapseLane* lane = lane_of<SynapseLane>(&node.get());
  if (PyTuple_GET_SIZE(args) > 1) (lane ? lane->claim(step) : void(node->claimed = step));
  return PyLong_FromLongLong(lane ? lane->claimed() : node->claimed);
  END_HANDLE_TH_ERRORS
}

PyObject* spikes_at(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  if (!THPVariable_CheckExact(tensor)) Py_RETURN_NONE;
  const Origin origin = origin_of(THPVariable_Unpack(tensor));
  if (!origin.lane) Py_RETURN_NONE;
  return Py_BuildValue("OL", origin.lane->node().tape, static_cast<long long>(origin.block));
  END_HANDLE_TH_ERRORS
}

PyObject* or_none(PyObject* result) {
  if (!result && !PyErr_Occurred()) Py_RETURN_NONE;
  return result;
}

PyObject* neuron_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count < 4 || !THPVariable_CheckExact(args[3])) Py_RETURN_NONE;
  NeuronLane* lane = lane_of<NeuronLane>(sequence_of(THPVariable_Unpack(args[3])));
  if (!lane || count != 3 + lane->given()) Py_RETURN_NONE;
  return or_none(lane->step(args[0], args[1], args[2], args + 3));
  END_HANDLE_TH_ERRORS
}

PyObject* synapse_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !THPVariable_CheckExact(args[1])) Py_RETURN_NONE;
  const at::Tensor& x = THPVariable_Unpack(args[1]);
  const Origin origin = origin_of(x);
  if (origin.unknown) Py_RETURN_NONE;
  NodePtr node;
  if (origin.lane) {
    node = origin.lane->synapse(args[0]);
  } else {
    const auto found = unowned_synapses.find(args[0]);
    if (found == unowned_synapses.end()) Py_RETURN_NONE;
    node = found->second.lock();
    if (!node) unowned_synapses.erase(found);
  }
  SynapseLane* lane = lane_of<SynapseLane>(static_cast<SequenceNode*>(node.get()));
  if (!lane || !is_ordinary(x, lane->type()) || !ordinary_mode()) Py_RETURN_NONE;
  return or_none(lane->step(args[0], x, origin.lane, origin.block, origin.is_view));
  END_HANDLE_TH_ERRORS
}

}  // namespace
