// From the numbers in a layer's description to the neuron struct that they name.
#pragma once
#include "../abi.h"
#include "alpha.h"
#include "delta_leaky.h"
#include "iaf.h"
#include "lapicque.h"
#include "leaky.h"
#include "li.h"
#include "lif.h"
#include "lif_adex.h"
#include "lif_box.h"
#include "lif_ex.h"
#include "lif_refrac.h"
#include "lsnn.h"
#include "rleaky.h"
#include "synaptic.h"

namespace snn {

// Calls visit(type tag) with the neuron struct that the layer names.
template <class N> struct Tag {
  using Neuron = N;
};
template <class T, class Visit> auto visit_leaky(const SnnLayer& layer, Visit visit) {
  if (layer.reset == kNone) return visit(Tag<Leaky<T, kNone, false>>());
  if (layer.reset == kZero)
    return layer.late_reset ? visit(Tag<Leaky<T, kZero, true>>()) : visit(Tag<Leaky<T, kZero, false>>());
  return layer.late_reset ? visit(Tag<Leaky<T, kSubtract, true>>()) : visit(Tag<Leaky<T, kSubtract, false>>());
}
template <class T, class Visit> auto visit_neuron(const SnnLayer& layer, Visit visit) {
  switch (layer.model) {
    case kSynaptic:
      return layer.late_reset ? visit(Tag<Synaptic<T, true, false>>()) : visit(Tag<Synaptic<T, false, false>>());
    case kRLeaky: return layer.late_reset ? visit(Tag<RLeaky<T, true>>()) : visit(Tag<RLeaky<T, false>>());
    case kRSynaptic: return visit(Tag<Synaptic<T, false, true>>());
    case kLapicque: return visit(Tag<Lapicque<T>>());
    case kAlpha: return visit(Tag<Alpha<T>>());
    case kDeltaLeaky: return visit(Tag<DeltaLeaky<T>>());
    case kLif: return visit(Tag<Lif<T, false>>());
    case kLifRecurrent: return visit(Tag<Lif<T, true>>());
    case kLi: return visit(Tag<Li<T>>());
    case kLifBox: return visit(Tag<LifBox<T>>());
    case kLiBox: return visit(Tag<LiBox<T>>());
    case kIaf: return visit(Tag<Iaf<T>>());
    case kLsnn: return visit(Tag<Lsnn<T, false>>());
    case kLsnnRecurrent: return visit(Tag<Lsnn<T, true>>());
    case kLifEx: return visit(Tag<LifEx<T, false>>());
    case kLifExRecurrent: return visit(Tag<LifEx<T, true>>());
    case kLifAdex: return visit(Tag<LifAdex<T, false>>());
    case kLifAdexRecurrent: return visit(Tag<LifAdex<T, true>>());
    case kLifRefrac: return visit(Tag<LifRefrac<T, false>>());
    case kLifRefracRecurrent: return visit(Tag<LifRefrac<T, true>>());
    default: return visit_leaky<T>(layer, visit);
  }
}
template <class Visit> auto visit_layer(const SnnLayer& layer, Visit visit) {
  return layer.dtype == kFloat32 ? visit_neuron<float>(layer, visit) : visit_neuron<double>(layer, visit);
}

}  // namespace snn
