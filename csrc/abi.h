// The C interface of the core: plain structs of sizes and pointers, one per kernel, filled by kernels.py.
// No torch, no Python: the same libraries serve every torch version. All sizes and strides count elements,
// all indices are 64 bits wide. A row is one (time step, batch) pair; a raster row is `words` 64-bit words.
#pragma once
#include <cstdint>

enum SnnDtype : int32_t { kFloat32 = 0, kFloat64 = 1 };
enum SnnModel : int32_t { kLeaky = 0, kLif = 1, kLi = 2 };
enum SnnReset : int32_t { kSubtract = 0, kZero = 1, kNone = 2 };

constexpr int kMaxStates = 2, kMaxParameters = 5;
constexpr int kTile = 64;  // columns of a tile: one raster word
constexpr int kOutOfMemory = -2;  // what any kernel returns when it cannot allocate its working memory

// A surrogate derivative; zero outside the open interval (low, high) of u - threshold.
struct SnnSurrogate {
  int32_t kind;
  int32_t unused;
  double a, b;
  double low, high;
};

// A neuron parameter, broadcast over [rows, cols] by its strides (0 or the real one).
struct SnnParameter {
  const void* data;
  int64_t row_stride, col_stride;
};

// What the forward and the backward scan of one layer share.
struct SnnLayer {
  int64_t rows, cols;  // batch rows and neurons of one time step
  int32_t dtype, model, reset, late_reset, threads, unused;
  SnnParameter parameters[kMaxParameters];
  SnnSurrogate surrogate;
};

// Runs `steps` time steps. Tables have one pointer a step; a null table or entry means "not wanted".
// Returns the number of steps done: fewer than `steps` when `values_capacity` might not hold one more step.
struct SnnNeuronForward {
  SnnLayer layer;
  int64_t steps;
  const void* const* input;              // [steps] -> [rows, cols] current
  const void* state_in[kMaxStates];      // [rows, cols] states before the first step
  void* state_out[kMaxStates];           // [rows, cols] states after the last step done
  void* const* states[kMaxStates];       // [steps] -> [rows, cols] states after each step
  void* const* output;                   // [steps] -> [rows, cols] spikes, or the membrane of an integrator
  uint64_t* const* raster;               // [steps] -> [rows, words] spikes
  uint64_t* const* reset;                // [steps] -> [rows, words] who was reset in this step
  uint64_t* const* active;               // [steps] -> [rows, words] surrogate derivative not zero
  void* const* membrane;                 // [steps] -> [rows, cols] u at the threshold comparison
  void* const* current;                  // [steps] -> [rows, cols] synaptic current at the comparison
  void* scratch;                         // [rows * words * kTile], needed with `active`
  void* values;                          // u of the active sites, in the order of the sites, step after step
  int64_t values_capacity;
  int64_t* active_counts;                // [steps] active sites of each step, or null
  int64_t* spike_counts;                 // [steps] spikes of each step, or null
};

struct SnnNeuronBackward {
  SnnLayer layer;
  int64_t steps;
  const void* const* grad_output;             // [steps] -> [rows, cols], null where no gradient arrived
  const void* const* grad_active;             // [steps] -> gradient of the output at the active sites only
  const void* const* grad_states[kMaxStates]; // [steps] -> [rows, cols]
  const uint64_t* const* raster;
  const uint64_t* const* reset;
  const uint64_t* const* active;
  const void* const* values;                  // [steps] -> u of the active sites, where membrane is null
  const void* const* membrane;                // [steps] -> [rows, cols]
  const void* const* current;
  const void* state_in[kMaxStates];           // needed with parameter gradients
  void* grad_input;                           // [steps, rows, cols] or null
  void* grad_state_in[kMaxStates];            // [rows, cols] or null
  void* grad_parameters[kMaxParameters];      // [rows, cols] sums over the steps, or null
};

// Returns the number of ones, or -1 when some value is neither 0 nor 1 (then `words` is undefined).
struct SnnRasterPack {
  const void* dense;  // [rows, cols]
  int64_t rows, cols, row_stride;
  uint64_t* words;
  int32_t dtype, threads;
};

struct SnnRasterUnpack {
  const uint64_t* words;
  int64_t rows, cols;
  void* dense;
  int32_t dtype, threads;
};

// words [rows, ceil(cols / 64)] -> transposed [cols, ceil(rows / 64)]
struct SnnRasterTranspose {
  const uint64_t* words;
  int64_t rows, cols;
  uint64_t* transposed;
  int32_t threads, unused;
};

// Returns the number of set bits.
struct SnnRasterCount {
  const uint64_t* words;
  int64_t count;  // of words
};

// Column lists of the set bits, block of rows by block of rows: the events of column j in block k are
// row[start[k * (cols + 1) + j] ... start[k * (cols + 1) + j + 1]), rows relative to the block.
// `rank` (or null): the place of each event in row-major order.
struct SnnRasterColumns {
  const uint64_t* words;
  int64_t rows, cols, block_rows;  // block_rows: a multiple of 64, at most 65536
  int64_t* start;
  uint16_t* row;
  int64_t* rank;
  int32_t threads, unused;
};

// weight [outputs, inputs] -> tiles [ceil(outputs / 64), inputs, 64], padded with zeros
struct SnnPackWeights {
  const void* weight;
  int64_t outputs, inputs;
  void* tiles;
  int32_t dtype, threads;
};

// current[row, :] = bias + sum of the weight columns of the inputs that spike in this row
struct SnnSynapseForward {
  const uint64_t* raster;  // [rows, words of inputs]
  int64_t rows, inputs, outputs;
  const void* tiles;
  const void* bias;        // [outputs] or null
  void* current;           // [rows, outputs]
  int32_t dtype, threads;
};

// grad_weight = grad^T spikes, grad_bias = column sums of grad; the spikes as column lists
struct SnnWeightGradient {
  const void* grad;  // [rows, outputs], dL/dcurrent
  int64_t rows, inputs, outputs, block_rows;
  const int64_t* start;
  const uint16_t* row;
  void* grad_weight;  // [outputs, inputs]
  void* grad_bias;    // [outputs] or null
  int32_t dtype, threads;
};

// grad_active[rank of event] = G[row, :] . weight[:, column], for the events of the column lists
struct SnnInputGradient {
  const void* grad;  // [rows, outputs]
  int64_t rows, inputs, outputs, block_rows;
  const void* tiles;
  const int64_t* start;
  const uint16_t* row;
  const int64_t* rank;
  void* grad_active;
  int32_t dtype, threads;
};
