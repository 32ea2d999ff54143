// The C interface of the core: plain structs of sizes and pointers, one per kernel, filled by kernels.py.
// No torch, no Python: the same libraries serve every torch version. All sizes and strides count elements,
// all indices are 64 bits wide. A row is one (time step, batch) pair; a raster row is `words` 64-bit words.
// The CPU and the CUDA library take the same structs. A member that only one of them reads says so. For CUDA, tables
// are in host memory and what they point to is in device memory, unless a comment says otherwise.
#pragma once
#include <cstdint>

enum SnnDtype : int32_t { kFloat32 = 0, kFloat64 = 1 };
enum SnnModel : int32_t {
  kLeaky, kSynaptic, kLapicque, kAlpha, kRLeaky, kRSynaptic,
  kDeltaLeaky, kLif, kLi, kLifBox, kLiBox, kIaf, kLsnn, kLifRecurrent, kLsnnRecurrent,
  kLifEx, kLifExRecurrent, kLifAdex, kLifAdexRecurrent, kLifRefrac, kLifRefracRecurrent
};
enum SnnReset : int32_t { kSubtract, kZero, kNone, kValue };  // kValue: to a reset potential

constexpr int kMaxStates = 3, kMaxTraces = 3, kMaxParameters = 9;
constexpr int kTile = 64;  // columns of a tile: one raster word
constexpr int kOutOfMemory = -2;  // what any kernel returns when it cannot allocate its working memory
constexpr int kCudaError = -1000;  // a CUDA kernel returns kCudaError - cudaError_t when something failed
constexpr int kSitesPerBlock = 512;  // CUDA: threads of a block of a scan, one a site
constexpr int kStepsPerLaunch = 28;  // CUDA: steps whose tables fit into the arguments of one launch
constexpr int kRowsPerStage = 128;   // CUDA: rows of gradients that a block holds in shared memory
constexpr int kInputsPerBlock = 128; // CUDA: inputs whose weight gradients a block sums
constexpr int kReportBits = 40;      // CUDA: bits of a count in a report, below its tag

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

// CUDA only: where a kernel leaves counts, since nothing returns to the host during a training step. `counts` is device
// memory, zeroed once: [0] and [1] run on from call to call. When a call is done, `slot` (two words of pinned host
// memory, or null) holds tag << kReportBits | count for each.
struct SnnReport {
  int64_t* counts;
  int64_t* slot;
  int64_t tag;
};

// What the forward and the backward scan of one layer share.
struct SnnLayer {
  int64_t rows, cols;  // batch rows and neurons of one time step
  int32_t dtype, model, reset, late_reset, threads, unused;
  SnnParameter parameters[kMaxParameters];
  SnnSurrogate surrogate;
};

// Runs `steps` time steps. Tables have one pointer a step; a null table or entry means "not wanted".
// Returns the number of steps done: on the CPU fewer than `steps` when `values_capacity` might not hold one more step.
struct SnnNeuronForward {
  SnnLayer layer;
  int64_t steps;
  const void* const* input;              // [steps] -> [rows, cols] current
  const void* const* recurrent;          // [steps] -> [rows, cols] current of the recurrence; of recurrent models only
  const void* state_in[kMaxStates];      // [rows, cols] states before the first step
  void* state_out[kMaxStates];           // [rows, cols] states after the last step done
  void* const* states[kMaxStates];       // [steps] -> [rows, cols] states after each step
  void* const* output;                   // [steps] -> [rows, cols] spikes, or the membrane of an integrator
  uint64_t* const* raster;               // [steps] -> [rows, words] spikes
  uint64_t* const* reset;                // [steps] -> [rows, words] who was reset in this step
  uint64_t* const* active;               // [steps] -> [rows, words] surrogate derivative not zero
  void* const* membrane;                 // [steps] -> [rows, cols] u at the threshold comparison
  // [steps] -> [rows, cols] what else the neuron struct traces; one of them may be read instead, see site.h
  void* const* traces[kMaxTraces];
  // u of the active sites. CPU: in the order of the sites, step after step. CUDA: blocks of kSitesPerBlock sites in any
  // order, each from its offset on, behind the report.counts[0] values that are there already.
  void* values;
  int64_t values_capacity;
  void* scratch;                         // CPU: [rows * words * kTile], needed with `active`
  int64_t* active_counts;                // CPU: [steps] active sites of each step, or null
  int64_t* spike_counts;                 // CPU: [steps] spikes of each step, or null
  int64_t* const* offsets;               // CUDA: [steps] -> [blocks of sites], needed with `values`
  SnnReport report;                      // CUDA: active sites, spikes; or null counts
};

// The tables may begin some steps after the beginning of the sequence: then `earlier` is not 0, and they have an entry
// before the first as well.
struct SnnNeuronBackward {
  SnnLayer layer;
  int64_t steps, earlier;
  const void* const* grad_output;             // [steps] -> [rows, cols], null where no gradient arrived
  // [steps] -> gradient of the output at the active sites only. CPU: [active sites]. CUDA: [rows, cols], rest unread.
  const void* const* grad_active;
  const void* const* grad_states[kMaxStates]; // [steps] -> [rows, cols]
  const void* grad_recurrent;                 // [rows, cols] of the output of the last step, from the recurrence; or null
  const void* carry_in[kMaxStates];           // [rows, cols] of the states after the last step, from later ones; or null
  const uint64_t* const* raster;
  const uint64_t* const* reset;
  const uint64_t* const* active;
  const void* const* values;                  // [steps] -> as in the forward scan, where membrane is null
  const int64_t* const* offsets;              // CUDA: as in the forward scan
  const void* const* membrane;                // [steps] -> [rows, cols]
  const void* const* derivative;              // [steps] -> that of kGiven, laid out as membrane, or else as values
  const void* const* traces[kMaxTraces];
  const void* state_in[kMaxStates];           // needed where a step needs the states before it
  void* grad_input;                           // [steps, rows, cols] or null
  void* grad_state_in[kMaxStates];            // [rows, cols] or null
  void* grad_parameters[kMaxParameters];      // [rows, cols] sums over the steps, or null
  void* carry[kMaxStates];                    // CUDA: [rows, cols] scratch, needed above kStepsPerLaunch steps
};

// CPU: returns the number of ones, or -1 when some value is neither 0 nor 1 (then `words` is undefined).
// CUDA: the bits of all values that are not zero.
struct SnnRasterPack {
  const void* dense;  // [rows, cols]
  int64_t rows, cols, row_stride;
  uint64_t* words;
  int32_t dtype, threads;
  SnnReport report;  // CUDA: nothing, bits set; or null counts
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

// CPU: returns the number of set bits.
struct SnnRasterCount {
  const uint64_t* words;
  int64_t count;  // of words
};

// CPU: column lists of the set bits, block of rows by block of rows: the events of column j in block k are
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
// CPU: in the order of the inputs, from the bias (or +0) on. With `chunks`: inputs are summed in runs [0, e0), [e0, e1),
// ..., each from +0 on, and then bias (or +0) + run 0 + run 1 + ..., runs without an event included. The last `apart` runs
// are added to each other first, and their sum then to the rest.
struct SnnSynapseForward {
  const uint64_t* raster;  // [rows, words of inputs]
  int64_t rows, inputs, outputs;
  const void* tiles;
  const void* bias;        // [outputs] or null
  const void* inputs_dense;  // CUDA: [rows, inputs] what the events are multiplied by, or null where all are 1
  void* current;           // [rows, outputs]
  int32_t dtype, threads;
  const int64_t* chunk_ends;  // CPU: [chunks], rising; the last is `inputs`
  int64_t chunks, apart;      // CPU: no chunks for one run that starts from the bias; apart < chunks
};

// grad_weight = grad^T spikes, grad_bias = column sums of grad.
// The spikes come as column lists (CPU) or as the transposed raster (CUDA).
struct SnnWeightGradient {
  const void* grad;  // [rows, outputs], dL/dcurrent
  int64_t rows, inputs, outputs;
  int64_t block_rows;           // CPU
  const int64_t* start;         // CPU
  const uint16_t* row;          // CPU
  const uint64_t* transposed;   // CUDA: [inputs, words of rows]
  const void* inputs_dense;     // CUDA: [rows, inputs] what the events are multiplied by, or null where all are 1
  void* partial;                // CUDA: scratch [splits, inputs, outputs]
  int64_t splits;               // CUDA: parts of the rows that are summed apart
  void* grad_weight;  // [outputs, inputs]
  void* grad_bias;    // CPU: [outputs] or null
  int32_t dtype, threads;
};

// G[row, :] . weight[:, column] at the active sites.
// They come as column lists (CPU) or as the transposed raster (CUDA).
struct SnnInputGradient {
  const void* grad;  // [rows, outputs]
  int64_t rows, inputs, outputs;
  int64_t block_rows;           // CPU
  const void* tiles;
  const int64_t* start;         // CPU
  const uint16_t* row;          // CPU
  const int64_t* rank;          // CPU: place of each event
  const uint64_t* transposed;   // CUDA: [inputs, words of rows]
  void* grad_active;  // CPU: [events], in the order of their ranks. CUDA: [rows, inputs], written at the sites only
  int32_t dtype, threads;
};

// CPU: the steps of a recurrent layer, whose product walks the spikes of the step before. The scan is that of all steps;
// its table `recurrent` is set here. Returns the number of steps done, as the scan does.
struct SnnRecurrentForward {
  SnnNeuronForward scan;      // with a raster of every step
  SnnSynapseForward product;  // its raster, rows and current are set here
  void* current;              // [rows, cols] of the recurrence: that of the first step; overwritten
};

// CPU: backward through these steps, where gradients through the recurrence are wanted at active sites only.
struct SnnRecurrentBackward {
  SnnNeuronBackward scan;     // grad_input and all of grad_state_in are needed
  const void* tiles;          // of the recurrent weight
  void* through;              // [rows, cols] working memory, finite
};

// ---- images: CPU only. Images of a row are [channels, height, width], and so are its raster's columns. ----

// A window that slides over images [height, width]; it stops at [out_height, out_width] places.
struct SnnWindow {
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// The maximum under each stop of the window: of equal values the first, row by row; a NaN always, of several the last.
struct SnnMaxPool {
  SnnWindow window;      // of at most 256 sites; at each stop one of them at least is inside the image
  int64_t planes;        // rows times channels
  const void* images;    // [planes, height, width]
  void* pooled;          // [planes, out_height, out_width]
  uint8_t* places;       // [planes, out_height, out_width]: number of the site in the window
  int32_t dtype, threads;
};

struct SnnMaxPoolBackward {
  SnnWindow window;
  int64_t planes;
  const void* grad;      // [planes, out_height, out_width]
  const uint8_t* places;
  void* grad_images;     // [planes, height, width]
  int32_t dtype, threads;
};

// A convolution without groups: images [channels, height, width] to currents [outputs, out_height, out_width].
// Its gradients dL/dcurrent may come pooled: with `places` not null, grad is that of the currents pooled by `pool`.
struct SnnConvolution {
  SnnWindow window;
  int64_t rows, channels, outputs, padded;  // padded: outputs, rounded up to whole vectors of 64 bytes
  const void* grad;
  const uint8_t* places;
  SnnWindow pool;
  int32_t dtype, threads;
};

// Channels are summed `together` at a time, from zero on, place by place of the window and in each place channel by
// channel; these sums are then added to the bias one after another.
struct SnnConvForward {
  SnnConvolution convolution;
  int64_t together;
  const uint64_t* raster;  // [rows, words] input spikes
  const void* weight;      // [channels, kernel_h, kernel_w, padded], zeros behind the outputs
  const void* bias;        // [outputs] or null
  void* current;
};

struct SnnConvWeightGradient {
  SnnConvolution convolution;
  const uint64_t* raster;  // [rows, words] input spikes
  void* grad_weight;       // [outputs, channels, kernel_h, kernel_w]
};

struct SnnConvInputGradient {
  SnnConvolution convolution;
  const uint64_t* active;  // [rows, words] sites where the gradient is wanted
  const void* weight;      // as in the forward product
  void* grad_active;       // [active sites]
};
