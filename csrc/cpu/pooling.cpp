// Max pooling that remembers one byte a site, and its backward.
#include <algorithm>
#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "windows.h"

namespace snn {
namespace SSB_ISA {
namespace {

// One row of stops of a window that lies inside the image everywhere; its size and stride are known to the compiler.
template <class T, int kernel, int stride>
void pool_row(const T* image, int64_t width, int64_t stops, T* pooled, uint8_t* places) {
  constexpr int64_t kStops = 64;
  int32_t place[kStops];  // as wide as a value, for the vectors
  for (int64_t first = 0; first < stops; first += kStops) {
    const int64_t count = std::min(kStops, stops - first);
    const T* corner = image + first * stride;
    for (int64_t i = 0; i < count; i++) {
      T best = corner[i * stride];
      int32_t found = 0;
      for (int y = 0; y < kernel; y++)
        for (int x = y ? 0 : 1; x < kernel; x++) {
          const T value = corner[y * width + i * stride + x];
          const bool larger = (value > best) | (value != value);
          best = larger ? value : best;
          found = larger ? y * kernel + x : found;
        }
      pooled[first + i] = best;
      place[i] = found;
    }
    for (int64_t i = 0; i < count; i++) places[first + i] = static_cast<uint8_t>(place[i]);
  }
}

template <class T> void pool_stop(const SnnWindow& w, const T* image, int64_t y, int64_t x, T* pooled, uint8_t* place) {
  T best = -std::numeric_limits<T>::infinity();
  int64_t found = -1;
  for (int64_t ky = 0; ky < w.kernel_h; ky++)
    for (int64_t kx = 0; kx < w.kernel_w; kx++) {
      const int64_t iy = site_of(y, ky, w.stride_h, w.pad_h, w.dilation_h);
      const int64_t ix = site_of(x, kx, w.stride_w, w.pad_w, w.dilation_w);
      if (iy < 0 || iy >= w.height || ix < 0 || ix >= w.width) continue;
      const T value = image[iy * w.width + ix];
      if (found < 0) found = ky * w.kernel_w + kx;
      if (value > best || value != value) {
        best = value;
        found = ky * w.kernel_w + kx;
      }
    }
  *pooled = best;
  *place = static_cast<uint8_t>(found);
}

template <class T> int64_t pool(const SnnMaxPool& a) {
  const SnnWindow& w = a.window;
  const int64_t size = w.height * w.width, stops = w.out_height * w.out_width;
  const bool inside = w.pad_h == 0 && w.pad_w == 0 && (w.out_height - 1) * w.stride_h + w.kernel_h <= w.height &&
                      (w.out_width - 1) * w.stride_w + w.kernel_w <= w.width;
  const bool plain = inside && w.dilation_h == 1 && w.dilation_w == 1 && w.kernel_h == w.kernel_w &&
                     w.stride_h == 2 && w.stride_w == 2;
  parallel_blocks(a.planes, a.threads, [&](int64_t plane) {
    const T* image = static_cast<const T*>(a.images) + plane * size;
    T* pooled = static_cast<T*>(a.pooled) + plane * stops;
    uint8_t* places = a.places + plane * stops;
    for (int64_t y = 0; y < w.out_height; y++) {
      const T* row = image + y * 2 * w.width;
      const int64_t first = y * w.out_width;
      if (plain && w.kernel_h == 2)
        pool_row<T, 2, 2>(row, w.width, w.out_width, pooled + first, places + first);
      else if (plain && w.kernel_h == 3)
        pool_row<T, 3, 2>(row, w.width, w.out_width, pooled + first, places + first);
      else
        for (int64_t x = 0; x < w.out_width; x++)
          pool_stop(w, image, y, x, pooled + first + x, places + first + x);
    }
  });
  return 0;
}

template <class T> int64_t spread(const SnnMaxPoolBackward& a) {
  const SnnWindow& w = a.window;
  const int64_t size = w.height * w.width, stops = w.out_height * w.out_width;
  const Spread to(w, 1);
  parallel_blocks(a.planes, a.threads, [&](int64_t plane) {
    T* image = static_cast<T*>(a.grad_images) + plane * size;
    std::fill(image, image + size, T(0));
    to.add(static_cast<const T*>(a.grad) + plane * stops, a.places + plane * stops, image);
  });
  return 0;
}

}  // namespace

int64_t max_pool(const SnnMaxPool& a) { return a.dtype == kFloat32 ? pool<float>(a) : pool<double>(a); }
int64_t max_pool_backward(const SnnMaxPoolBackward& a) {
  return a.dtype == kFloat32 ? spread<float>(a) : spread<double>(a);
}

}  // namespace SSB_ISA
}  // namespace snn
