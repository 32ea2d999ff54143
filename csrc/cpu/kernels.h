// The kernels of the core. Each file beside this one is compiled once per instruction set (SSB_ISA names the
// namespace); dispatch.cpp exports the build that fits the processor it runs on.
#pragma once
#include "../abi.h"

#define SNN_KERNELS(X)                         \
  X(neuron_forward, SnnNeuronForward)          \
  X(neuron_backward, SnnNeuronBackward)        \
  X(raster_pack, SnnRasterPack)                \
  X(raster_unpack, SnnRasterUnpack)            \
  X(raster_transpose, SnnRasterTranspose)      \
  X(raster_count, SnnRasterCount)              \
  X(raster_columns, SnnRasterColumns)          \
  X(pack_weights, SnnPackWeights)              \
  X(synapse_forward, SnnSynapseForward)        \
  X(weight_gradient, SnnWeightGradient)        \
  X(input_gradient, SnnInputGradient)          \
  X(recurrent_forward, SnnRecurrentForward)    \
  X(recurrent_backward, SnnRecurrentBackward)  \
  X(max_pool, SnnMaxPool)                      \
  X(max_pool_backward, SnnMaxPoolBackward)     \
  X(conv_forward, SnnConvForward)              \
  X(conv_weight_gradient, SnnConvWeightGradient) \
  X(conv_input_gradient, SnnConvInputGradient)

#define SNN_DECLARE(name, Arguments) int64_t name(const Arguments&);
#define SNN_NAMESPACE(isa) \
  namespace snn {          \
  namespace isa {          \
  SNN_KERNELS(SNN_DECLARE) \
  }                        \
  }

#ifdef SSB_ISA
SNN_NAMESPACE(SSB_ISA)
#endif
