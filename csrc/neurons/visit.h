// From the numbers in a layer's description to the neuron struct that they name.
#pragma once
#include "../abi.h"
#include "leaky.h"
#include "li.h"
#include "lif.h"

namespace snn {

// Calls visit(type tag) with the neuron struct that the layer names.
template <class N> struct Tag {
  using Neuron = N;
};
template <class T, class Visit> auto visit_neuron(const SnnLayer& layer, Visit visit) {
  if (layer.model == kLif) return visit(Tag<Lif<T>>());
  if (layer.model == kLi) return visit(Tag<Li<T>>());
  if (layer.reset == kNone) return visit(Tag<Leaky<T, kNone, false>>());
  if (layer.reset == kZero)
    return layer.late_reset ? visit(Tag<Leaky<T, kZero, true>>()) : visit(Tag<Leaky<T, kZero, false>>());
  return layer.late_reset ? visit(Tag<Leaky<T, kSubtract, true>>()) : visit(Tag<Leaky<T, kSubtract, false>>());
}
template <class Visit> auto visit_layer(const SnnLayer& layer, Visit visit) {
  return layer.dtype == kFloat32 ? visit_neuron<float>(layer, visit) : visit_neuron<double>(layer, visit);
}

}  // namespace snn
