// Max pooling that remembers one byte a site, and its backward.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "windows.h"

namespace snn {
namespace SSB_ISA {
namespace {

constexpr int64_t kStops = 64;  // at a time

// Windows that lie inside their images: of the 64 at some corners, the maxima and their places. Without branches, as
// nobody can foresee which value is larger.
template <class T, class Place>
void pool_inside(const T* images, const int32_t* corner, const std::vector<int32_t>& inner, T* best, Place* found) {
  for (int64_t i = 0; i < kStops; i++) best[i] = images[corner[i] + inner[0]];
  std::fill(found, found + kStops, Place(0));
  for (size_t k = 1; k < inner.size(); k++)
    for (int64_t i = 0; i < kStops; i++) {
      const T value = images[corner[i] + inner[k]];
      const bool larger = (value > best[i]) | (value != value);
      best[i] = larger ? value : best[i];
      found[i] = larger ? static_cast<Place>(k) : found[i];
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
  using Place = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;  // as wide as a value, for the vectors
  const SnnWindow& w = a.window;
  const int64_t size = w.height * w.width, stops = w.out_height * w.out_width;
  const bool inside = w.pad_h == 0 && w.pad_w == 0 &&
                      site_of(w.out_height - 1, w.kernel_h - 1, w.stride_h, 0, w.dilation_h) < w.height &&
                      site_of(w.out_width - 1, w.kernel_w - 1, w.stride_w, 0, w.dilation_w) < w.width;
  // Small planes are taken together. Behind the last corner the first one is read again.
  const int64_t together = std::max<int64_t>(1, 4 * kStops / std::max<int64_t>(stops, 1));
  std::vector<int32_t> corner((together * stops + kStops - 1) / kStops * kStops, 0), inner;
  for (int64_t i = 0; i < together * stops; i++) {
    const int64_t stop = i % stops;
    corner[i] = static_cast<int32_t>(i / stops * size + stop / w.out_width * w.stride_h * w.width +
                                     stop % w.out_width * w.stride_w);
  }
  for (int64_t k = 0; k < w.kernel_h * w.kernel_w; k++)
    inner.push_back(static_cast<int32_t>(k / w.kernel_w * w.dilation_h * w.width + k % w.kernel_w * w.dilation_w));
  parallel_blocks((a.planes + together - 1) / together, a.threads, [&](int64_t group) {
    const int64_t first = group * together, planes = std::min(together, a.planes - first);
    const T* images = static_cast<const T*>(a.images) + first * size;
    T* pooled = static_cast<T*>(a.pooled) + first * stops;
    uint8_t* places = a.places + first * stops;
    if (!inside) {
      for (int64_t i = 0; i < planes * stops; i++)
        pool_stop(w, images + i / stops * size, i % stops / w.out_width, i % w.out_width, pooled + i, places + i);
      return;
    }
    for (int64_t i = 0; i < planes * stops; i += kStops) {
      int32_t from[kStops];
      T best[kStops];
      Place found[kStops];
      const int64_t count = std::min(kStops, planes * stops - i);
      std::copy_n(&corner[i], kStops, from);
      std::fill(from + count, from + kStops, from[0]);
      pool_inside(images, from, inner, best, found);
      std::copy_n(best, count, pooled + i);
      for (int64_t k = 0; k < count; k++) places[i + k] = static_cast<uint8_t>(found[k]);
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
