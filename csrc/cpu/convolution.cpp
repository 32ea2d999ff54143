// The three products of a convolution, event by event. The images of one row lie in a scratch memory with the outputs
// side by side: a spike, or an active site, touches the outputs of each window it lies in, as whole vectors.
#include <algorithm>
#include <vector>

#include "../raster.h"
#include "kernels.h"
#include "parallel.h"
#include "windows.h"

namespace snn {
namespace SSB_ISA {
namespace {

// The stops of the window that cover a site along one axis, with the place it has there.
class Axis {
 public:
  struct Stop {
    int64_t place, stop;
  };
  Axis(int64_t sites, int64_t stops, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) : first_(sites + 1) {
    for (int64_t site = 0; site < sites; site++) {
      first_[site] = static_cast<int64_t>(all_.size());
      for (int64_t k = 0; k < kernel; k++) {
        const int64_t at = site + pad - k * dilation;
        if (at >= 0 && at % stride == 0 && at / stride < stops) all_.push_back({k, at / stride});
      }
    }
    first_[sites] = static_cast<int64_t>(all_.size());
  }
  const Stop* begin(int64_t site) const { return all_.data() + first_[site]; }
  const Stop* end(int64_t site) const { return all_.data() + first_[site + 1]; }

 private:
  std::vector<Stop> all_;
  std::vector<int64_t> first_;
};

template <class T> class Images {
 public:
  explicit Images(const SnnConvolution& a)
      : a(a), w(a.window), stops(w.out_height * w.out_width), words(words_of(a.channels * w.height * w.width)),
        y_(w.height, w.out_height, w.kernel_h, w.stride_h, w.pad_h, w.dilation_h),
        x_(w.width, w.out_width, w.kernel_w, w.stride_w, w.pad_w, w.dilation_w),
        spread_(a.places ? a.pool : SnnWindow{}, a.padded) {}

  // Calls visit(weight, image): offsets into [channels, kernel_h, kernel_w, padded] and [stops, padded], of every window
  // that a site lies in.
  template <class Visit> SNN_HD void windows_of(int64_t site, Visit visit) const {
    const uint32_t size = static_cast<uint32_t>(w.height * w.width), width = static_cast<uint32_t>(w.width);
    const uint32_t channel = static_cast<uint32_t>(site) / size, inside = static_cast<uint32_t>(site) % size;
    const uint32_t row = inside / width, column = inside % width;
    for (auto y = y_.begin(row); y != y_.end(row); ++y)
      for (auto x = x_.begin(column); x != x_.end(column); ++x)
        visit(((channel * w.kernel_h + y->place) * w.kernel_w + x->place) * a.padded,
              (y->stop * w.out_width + x->stop) * a.padded);
  }
  template <class Visit> SNN_HD void sites_of(const uint64_t* raster, Visit visit) const {
    for (int64_t word = 0; word < words; word++)
      for_each_bit(raster[word], [&](int bit) { visit(64 * word + bit); });
  }

  // The gradients of one row as [stops, padded].
  void gradients(int64_t row, T* out) const {
    if (a.places) {
      const int64_t pooled = a.pool.out_height * a.pool.out_width, first = row * a.outputs * pooled;
      std::fill(out, out + stops * a.padded, T(0));
      for (int64_t o = 0; o < a.outputs; o++)
        spread_.add(static_cast<const T*>(a.grad) + first + o * pooled, a.places + first + o * pooled, out + o);
      return;
    }
    const T* grad = static_cast<const T*>(a.grad) + row * a.outputs * stops;
    for (int64_t p = 0; p < stops && a.outputs < a.padded; p++)
      std::fill(out + p * a.padded + a.outputs, out + (p + 1) * a.padded, T(0));
    for (int64_t o = 0; o < a.outputs; o++)
      for (int64_t p = 0; p < stops; p++) out[p * a.padded + o] = grad[o * stops + p];
  }

  const SnnConvolution& a;
  const SnnWindow& w;
  const int64_t stops, words;

 private:
  Axis y_, x_;
  Spread spread_;
};

// to += from, `vectors` of 64 bytes; the number may be a constant.
template <class T, class Count> SNN_HD void add(const T* from, T* to, Count vectors) {
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t at = v * kVectorLanes<T>;
    store(to + at, load(to + at) + load(from + at));
  }
}

// Tells the compiler the usual numbers of vectors.
template <class T, class Body> void with_vectors(int64_t padded, Body body) {
  switch (padded / kVectorLanes<T>) {
    case 1: return body(std::integral_constant<int64_t, 1>());
    case 2: return body(std::integral_constant<int64_t, 2>());
    case 4: return body(std::integral_constant<int64_t, 4>());
    default: return body(padded / kVectorLanes<T>);
  }
}

// ---------------------------------------------------------------------------------------------- forward

template <class T> int64_t forward(const SnnConvForward& a) {
  const SnnConvolution& c = a.convolution;
  const Images<T> images(c);
  const T *weight = static_cast<const T*>(a.weight), *given = static_cast<const T*>(a.bias);
  std::vector<T> bias(c.padded, T(0));
  if (given) std::copy_n(given, c.outputs, bias.begin());
  const int64_t blocks = std::min<int64_t>(c.rows, std::max(1, 4 * c.threads));
  parallel_for(blocks, c.threads, [&](int64_t block) {
    Scratch<T> sums(images.stops * c.padded);
    for (int64_t row = c.rows * block / blocks; row < c.rows * (block + 1) / blocks; row++) {
      for (int64_t p = 0; p < images.stops; p++) std::copy_n(bias.data(), c.padded, &sums[p * c.padded]);
      with_vectors<T>(c.padded, [&](auto vectors) {
        images.sites_of(a.raster + row * images.words, [&](int64_t site) {
          images.windows_of(site, [&](int64_t from, int64_t to) { add(weight + from, &sums[to], vectors); });
        });
      });
      T* out = static_cast<T*>(a.current) + row * c.outputs * images.stops;
      for (int64_t o = 0; o < c.outputs; o++)
        for (int64_t p = 0; p < images.stops; p++) out[o * images.stops + p] = sums[p * c.padded + o];
    }
  });
  return 0;
}

// -------------------------------------------------------------------------------------- gradient of the weight

// Parts of the rows that are summed apart. Their number follows from the sizes alone, so the sum does not depend on
// the number of threads.
template <class T> int64_t parts_of(const SnnConvolution& c, int64_t size) {
  constexpr int64_t kRows = 64, kParts = 16, kBytes = 32 << 20;
  return std::clamp<int64_t>(std::min(c.rows / kRows, kBytes / (size * static_cast<int64_t>(sizeof(T)))), 1, kParts);
}

template <class T> int64_t weight_gradient_of(const SnnConvWeightGradient& a) {
  const SnnConvolution& c = a.convolution;
  const Images<T> images(c);
  const int64_t places = c.channels * c.window.kernel_h * c.window.kernel_w, size = places * c.padded;
  const int64_t parts = parts_of<T>(c, size);
  Scratch<T> sums(parts * size);
  parallel_for(parts, c.threads, [&](int64_t part) {
    T* sum = &sums[part * size];
    std::fill(sum, sum + size, T(0));
    Scratch<T> grad(images.stops * c.padded);
    for (int64_t row = c.rows * part / parts; row < c.rows * (part + 1) / parts; row++) {
      const uint64_t* raster = a.raster + row * images.words;
      if (std::all_of(raster, raster + images.words, [](uint64_t word) { return word == 0; })) continue;
      images.gradients(row, grad.get());
      with_vectors<T>(c.padded, [&](auto vectors) {
        images.sites_of(raster, [&](int64_t site) {
          images.windows_of(site, [&](int64_t to, int64_t from) { add(&grad[from], sum + to, vectors); });
        });
      });
    }
  });
  parallel_blocks(places, c.threads, [&](int64_t place) {
    T* sum = &sums[place * c.padded];
    for (int64_t part = 1; part < parts; part++) add(sum + part * size, sum, c.padded / kVectorLanes<T>);
    for (int64_t o = 0; o < c.outputs; o++) static_cast<T*>(a.grad_weight)[o * places + place] = sum[o];
  });
  return 0;
}

// ------------------------------------------------------------------------------------- gradient of the inputs

template <class T> SNN_HD T total(const Vector<T>& v) {
  T sum = T(0);
  for (int i = 0; i < kVectorLanes<T>; i++) sum += v[i];
  return sum;
}

template <class T> int64_t input_gradient_of(const SnnConvInputGradient& a) {
  const SnnConvolution& c = a.convolution;
  const Images<T> images(c);
  const T* weight = static_cast<const T*>(a.weight);
  std::vector<int64_t> first(c.rows + 1, 0);
  for (int64_t row = 0; row < c.rows; row++) {
    const uint64_t* active = a.active + row * images.words;
    first[row + 1] = first[row];
    for (int64_t word = 0; word < images.words; word++) first[row + 1] += count_bits(active[word]);
  }
  const int64_t blocks = std::min<int64_t>(c.rows, std::max(1, 4 * c.threads));
  parallel_for(blocks, c.threads, [&](int64_t block) {
    Scratch<T> grad(images.stops * c.padded);
    for (int64_t row = c.rows * block / blocks; row < c.rows * (block + 1) / blocks; row++) {
      if (first[row] == first[row + 1]) continue;
      images.gradients(row, grad.get());
      T* out = static_cast<T*>(a.grad_active) + first[row];
      with_vectors<T>(c.padded, [&](auto vectors) {
        images.sites_of(a.active + row * images.words, [&](int64_t site) {
          Vector<T> even{}, odd{};  // two chains hide the latency of the additions
          images.windows_of(site, [&](int64_t from, int64_t to) {
            for (int64_t v = 0; v < vectors; v++) {
              const int64_t at = v * kVectorLanes<T>;
              (v % 2 ? odd : even) += load(weight + from + at) * load(&grad[to + at]);
            }
          });
          *out++ = total<T>(even + odd);
        });
      });
    }
  });
  return 0;
}

}  // namespace

int64_t conv_forward(const SnnConvForward& a) {
  return a.convolution.dtype == kFloat32 ? forward<float>(a) : forward<double>(a);
}
int64_t conv_weight_gradient(const SnnConvWeightGradient& a) {
  return a.convolution.dtype == kFloat32 ? weight_gradient_of<float>(a) : weight_gradient_of<double>(a);
}
int64_t conv_input_gradient(const SnnConvInputGradient& a) {
  return a.convolution.dtype == kFloat32 ? input_gradient_of<float>(a) : input_gradient_of<double>(a);
}

}  // namespace SSB_ISA
}  // namespace snn
