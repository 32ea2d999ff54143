// Windows that slide over images, for convolutions and pooling.
#pragma once
#include <algorithm>
#include <vector>

#include "../abi.h"
#include "parallel.h"

namespace snn {
namespace SSB_ISA {

// The site, along one axis, that place k of the window covers at a stop; may be outside the image.
inline int64_t site_of(int64_t stop, int64_t k, int64_t stride, int64_t pad, int64_t dilation) {
  return stop * stride - pad + k * dilation;
}

// Runs task(i) for i in [0, count), several neighbours a thread.
template <class Task> inline void parallel_blocks(int64_t count, int threads, Task task) {
  const int64_t blocks = threads > 1 ? std::min<int64_t>(count, 4 * threads) : 1;
  parallel_for(blocks, threads, [&](int64_t block) {
    for (int64_t i = count * block / blocks; i < count * (block + 1) / blocks; i++) task(i);
  });
}

// Where the gradient of a maximum goes in its image, whose sites are `step` values apart.
class Spread {
 public:
  Spread(const SnnWindow& w, int64_t step)
      : stops_(w.out_height * w.out_width), corner_(stops_), inner_(w.kernel_h * w.kernel_w) {
    for (int64_t y = 0; y < w.out_height; y++)
      for (int64_t x = 0; x < w.out_width; x++)
        corner_[y * w.out_width + x] = step * (site_of(y, 0, w.stride_h, w.pad_h, w.dilation_h) * w.width +
                                               site_of(x, 0, w.stride_w, w.pad_w, w.dilation_w));
    for (int64_t y = 0; y < w.kernel_h; y++)
      for (int64_t x = 0; x < w.kernel_w; x++)
        inner_[y * w.kernel_w + x] = step * (y * w.dilation_h * w.width + x * w.dilation_w);
  }

  template <class T> void add(const T* grad, const uint8_t* places, T* image) const {
    for (int64_t i = 0; i < stops_; i++) image[corner_[i] + inner_[places[i]]] += grad[i];
  }

 private:
  int64_t stops_;
  std::vector<int64_t> corner_, inner_;
};

}  // namespace SSB_ISA
}  // namespace snn
