// The kernels of the CUDA library. They take the structs of the CPU's kernels and a stream, and only enqueue work:
// no synchronisation, no memory of their own, so that they can be captured in a CUDA graph.
#pragma once
#include "../abi.h"
#include "launch.h"

#define SNN_CUDA_KERNELS(X)                    \
  X(neuron_forward, SnnNeuronForward)          \
  X(neuron_backward, SnnNeuronBackward)        \
  X(raster_pack, SnnRasterPack)                \
  X(raster_unpack, SnnRasterUnpack)            \
  X(raster_transpose, SnnRasterTranspose)      \
  X(pack_weights, SnnPackWeights)              \
  X(synapse_forward, SnnSynapseForward)        \
  X(weight_gradient, SnnWeightGradient)        \
  X(input_gradient, SnnInputGradient)

namespace snn {
namespace cuda {

#define SNN_DECLARE(name, Arguments) cudaError_t name(const Arguments&, cudaStream_t);
SNN_CUDA_KERNELS(SNN_DECLARE)
#undef SNN_DECLARE

}  // namespace cuda
}  // namespace snn
