// The three products of a convolution, event by event. The images of one row lie in a scratch memory with the outputs
// side by side: a spike, or an active site, touches the outputs of each window it lies in, as whole vectors.
#include <algorithm>
#include <vector>

#include "../raster.h"
#include "kernels.h"
#include "parallel.h"
#include "strips.h"
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
    transpose_all(grad, stops, a.outputs, stops, out, a.padded);
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

// For each place of the window and each site along one axis: the offset of the stop that covers it there, -1 if none.
std::vector<int32_t> stops_of(int64_t sites, int64_t stops, int64_t kernel, int64_t stride, int64_t pad,
                              int64_t dilation, int64_t apart) {
  std::vector<int32_t> found(kernel * sites, -1);
  for (int64_t k = 0; k < kernel; k++)
    for (int64_t site = 0; site < sites; site++) {
      const int64_t at = site + pad - k * dilation;
      if (at >= 0 && at % stride == 0 && at / stride < stops)
        found[k * sites + site] = static_cast<int32_t>(at / stride * apart);
    }
  return found;
}

// The spikes of some channels of one row, in their order, and those of them that a place of the window touches.
struct Spikes {
  explicit Spikes(int64_t most) : weight(most), row(most), column(most), from(most), to(most), at(most) {}
  Scratch<int32_t> weight, row, column;  // of all: where the weights of the channel begin, where the spike is
  Scratch<int32_t> from, to, at;
};

template <class T> class ForwardProduct {
 public:
  explicit ForwardProduct(const SnnConvForward& a)
      : a_(a), c_(a.convolution), w_(c_.window), images_(c_), plane_(w_.height * w_.width),
        rows_(stops_of(w_.height, w_.out_height, w_.kernel_h, w_.stride_h, w_.pad_h, w_.dilation_h,
                       w_.out_width * c_.padded)),
        columns_(stops_of(w_.width, w_.out_width, w_.kernel_w, w_.stride_w, w_.pad_w, w_.dilation_w, c_.padded)),
        bias_(c_.padded, T(0)) {
    if (a.bias) std::copy_n(static_cast<const T*>(a.bias), c_.outputs, bias_.begin());
  }

  int64_t image() const { return images_.stops * c_.padded; }
  int64_t most_spikes() const { return std::min(a_.together, c_.channels) * plane_; }

  void row(int64_t row, Spikes& spikes, T* sum, T* total) const {
    const bool at_once = a_.together >= c_.channels;  // then there is one sum, to which the bias is added
    for (int64_t p = 0; p < images_.stops && !at_once; p++)
      std::copy_n(bias_.data(), c_.padded, total + p * c_.padded);
    for (int64_t channel = 0; channel < c_.channels; channel += a_.together) {
      const int64_t end = std::min(channel + a_.together, c_.channels);
      const int64_t count = collect(row, channel, end, spikes);
      if (channel && !count) continue;
      std::fill(sum, sum + image(), T(0));
      with_vectors<T>(c_.padded, [&](auto vectors) { add_weights(spikes, count, sum, vectors); });
      if (!at_once) add(sum, total, image() / kVectorLanes<T>);
    }
    for (int64_t p = 0; p < images_.stops && at_once; p++)
      add(bias_.data(), sum + p * c_.padded, c_.padded / kVectorLanes<T>);
    transpose_all(at_once ? sum : total, c_.padded, images_.stops, c_.outputs,
                  static_cast<T*>(a_.current) + row * c_.outputs * images_.stops, images_.stops);
  }

 private:
  int64_t collect(int64_t row, int64_t channel, int64_t end, Spikes& spikes) const {
    const uint64_t* raster = a_.raster + row * images_.words;
    const int64_t first = channel * plane_, last = end * plane_;
    const uint32_t plane = static_cast<uint32_t>(plane_), width = static_cast<uint32_t>(w_.width);
    const int32_t places = static_cast<int32_t>(w_.kernel_h * w_.kernel_w * c_.padded);
    int64_t count = 0;
    for (int64_t word = first / 64; word * 64 < last; word++) {
      uint64_t bits = raster[word];
      if (word * 64 < first) bits &= ~uint64_t(0) << (first & 63);
      if (word * 64 + 64 > last) bits &= ~(~uint64_t(0) << (last & 63));
      for_each_bit(bits, [&](int bit) {
        const uint32_t site = static_cast<uint32_t>(64 * word + bit), inside = site % plane;
        spikes.weight[count] = static_cast<int32_t>(site / plane) * places;
        spikes.row[count] = static_cast<int32_t>(inside / width);
        spikes.column[count++] = static_cast<int32_t>(inside % width);
      });
    }
    return count;
  }

  // Place by place of the window, so that each sum runs through places and then channels. Who is not touched is
  // overwritten by the next: no branch that nobody can foresee.
  template <class Count> SNN_HD void add_weights(Spikes& spikes, int64_t count, T* sum, Count vectors) const {
    const T* weight = static_cast<const T*>(a_.weight);
    for (int64_t ky = 0; ky < w_.kernel_h; ky++) {
      const int32_t* row_of = &rows_[ky * w_.height];
      int64_t hits = 0;
      for (int64_t e = 0; e < count; e++) {
        const int32_t row = row_of[spikes.row[e]];
        spikes.from[hits] = spikes.weight[e];
        spikes.to[hits] = row;
        spikes.at[hits] = spikes.column[e];
        hits += row >= 0;
      }
      for (int64_t kx = 0; kx < w_.kernel_w; kx++) {
        const int32_t* column_of = &columns_[kx * w_.width];
        const T* place = weight + (ky * w_.kernel_w + kx) * c_.padded;
        for (int64_t e = 0; e < hits; e++) {
          const int32_t column = column_of[spikes.at[e]];
          if (column >= 0) add(place + spikes.from[e], sum + spikes.to[e] + column, vectors);
        }
      }
    }
  }

  const SnnConvForward& a_;
  const SnnConvolution& c_;
  const SnnWindow& w_;
  const Images<T> images_;
  const int64_t plane_;
  const std::vector<int32_t> rows_, columns_;
  std::vector<T> bias_;
};

template <class T> int64_t forward(const SnnConvForward& a) {
  const SnnConvolution& c = a.convolution;
  const ForwardProduct<T> product(a);
  const int64_t blocks = std::min<int64_t>(c.rows, std::max(1, 4 * c.threads));
  parallel_for(blocks, c.threads, [&](int64_t block) {
    Scratch<T> sum(product.image()), total(product.image());
    Spikes spikes(product.most_spikes());
    for (int64_t row = c.rows * block / blocks; row < c.rows * (block + 1) / blocks; row++)
      product.row(row, spikes, sum.get(), total.get());
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
