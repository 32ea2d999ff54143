// The gradients of a synapse, event by event. Rows are cut into blocks so that one strip of the arriving gradients
// stays in the second-level cache. Each result is summed in an order that does not depend on the number of threads.
#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "strips.h"

namespace snn {
namespace SSB_ISA {
namespace {

// ---------------------------------------------------------------------------------------------- weights

// Vectors of a strip. What is added to less than eight sums is added to them and to others in turn, since one chain of
// additions would wait for each result.
constexpr int kSumVectors = kVectorBytes == 64 ? kStripVectors / 2 : kStripVectors;

// A strip of the outputs from `output` on, for the inputs [j0, j1).
template <class T, int kVectors> void weight_strip(const SnnWeightGradient& a, int64_t output, int64_t j0, int64_t j1) {
  using Sum = Strip<T, kVectors>;
  constexpr int64_t columns = Sum::kColumns;
  const int64_t blocks = (a.rows + a.block_rows - 1) / a.block_rows;
  const StripRows<T, kVectors> source(std::min(a.block_rows, a.rows), a.outputs, output);
  const Scratch<T> sums((j1 - j0) * columns);
  std::fill(sums.get(), sums.get() + (j1 - j0) * columns, T(0));
  const bool wants_bias = a.grad_bias && j0 == 0;
  Sum bias;
  bias.zero();
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t first = k * a.block_rows, rows = std::min(a.block_rows, a.rows - first);
    const T* grad = source.copy(static_cast<const T*>(a.grad) + first * a.outputs, rows);
    const int64_t* start = a.start + k * (a.inputs + 1);
    for (int64_t j = j0; j < j1; j++) {
      int64_t e = start[j];
      const int64_t end = start[j + 1];
      if (e == end) continue;
      Sum even, odd;
      even.set(&sums[(j - j0) * columns]);
      if constexpr (kVectors < 8) {
        odd.zero();
        for (; e + 1 < end; e += 2) {
          even.add(grad + a.row[e] * columns);
          odd.add(grad + a.row[e + 1] * columns);
        }
        if (e < end) even.add(grad + a.row[e] * columns);
        even.add(odd);
      } else {
        for (; e < end; e++) even.add(grad + a.row[e] * columns);
      }
      even.put(&sums[(j - j0) * columns]);
    }
    if (!wants_bias) continue;
    Sum block;
    block.zero();
    for (int64_t r = 0; r < rows; r++) block.add(grad + r * columns);
    bias.add(block);
  }
  transpose_all(sums.get(), columns, j1 - j0, source.lanes(),
                static_cast<T*>(a.grad_weight) + output * a.inputs + j0, a.inputs);
  if (!wants_bias) return;
  T padded[columns];
  bias.put(padded);
  std::copy_n(padded, source.lanes(), static_cast<T*>(a.grad_bias) + output);
}

template <class T> int64_t weight_gradient_of(const SnnWeightGradient& a) {
  constexpr int64_t columns = Strip<T, kSumVectors>::kColumns;
  const int64_t strips = (a.outputs + columns - 1) / columns;
  if (strips == 0) return 0;
  // Narrow layers have fewer strips than threads: then the inputs are split as well.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(a.inputs, 2 * a.threads / strips));
  parallel_for(strips * parts, a.threads, [&](int64_t task) {
    const int64_t output = task / parts * columns, part = task % parts;
    visit_vectors<T, kSumVectors>(a.outputs - output, [&](auto vectors) {
      weight_strip<T, decltype(vectors)::value>(a, output, a.inputs * part / parts, a.inputs * (part + 1) / parts);
    });
  });
  return 0;
}

// ----------------------------------------------------------------------------------------------- inputs

template <class T, int kVectors> SNN_HD Vector<T> products(const Strip<T, kVectors>& weight, const T* grad) {
  Vector<T> sum = weight.v[0] * load(grad);
  for (int i = 1; i < kVectors; i++) sum += weight.v[i] * load(grad + i * kVectorLanes<T>);
  return sum;
}

template <class T, int lanes> struct Lanes {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <class T> using Four = typename Lanes<T, 4>::type;

// Four lanes (or less) that add up to the sum over all lanes. (Lanes are named one by one: g++ 11 has no
// __builtin_shufflevector, and others make the same shuffles of both.)
template <class V> SNN_HD auto quarter(const V& v) {
  using T = std::remove_cv_t<std::remove_reference_t<decltype(v[0])>>;
  constexpr int lanes = sizeof(V) / sizeof(T);
  using Half = typename Lanes<T, lanes / 2>::type;
  if constexpr (lanes == 16)
    return quarter(Half{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]} +
                   Half{v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]});
  else if constexpr (lanes == 8)
    return Half{v[0], v[1], v[2], v[3]} + Half{v[4], v[5], v[6], v[7]};
  else
    return v;
}

// The sums over the lanes of four vectors, which share their shuffles.
#if defined(__AVX512F__)
SNN_HD Four<float> totals(const Vector<float>& a, const Vector<float>& b, const Vector<float>& c,
                          const Vector<float>& d) {
  const __m512 ab = low_lanes(a, b) + high_lanes(a, b), cd = low_lanes(c, d) + high_lanes(c, d);
  return quarter(low_pairs(ab, cd) + high_pairs(ab, cd));
}
SNN_HD Four<double> totals(const Vector<double>& a, const Vector<double>& b, const Vector<double>& c,
                           const Vector<double>& d) {
  const Four<double> x = quarter(low_lanes(a, b) + high_lanes(a, b)), y = quarter(low_lanes(c, d) + high_lanes(c, d));
  return Four<double>{x[0], x[1], y[0], y[1]} + Four<double>{x[2], x[3], y[2], y[3]};
}
#else
template <class V> SNN_HD auto totals(const V& va, const V& vb, const V& vc, const V& vd) {
  const auto a = quarter(va), b = quarter(vb), c = quarter(vc), d = quarter(vd);
  using T = std::remove_cv_t<std::remove_reference_t<decltype(a[0])>>;
  using F = Four<T>;
  if constexpr (sizeof(a) == 2 * sizeof(T)) {
    return F{a[0], b[0], c[0], d[0]} + F{a[1], b[1], c[1], d[1]};
  } else {
    const F ab = F{a[0], b[0], a[1], b[1]} + F{a[2], b[2], a[3], b[3]};
    const F cd = F{c[0], d[0], c[1], d[1]} + F{c[2], d[2], c[3], d[3]};
    return F{ab[0], ab[1], cd[0], cd[1]} + F{ab[2], ab[3], cd[2], cd[3]};
  }
}
#endif

// sums[i] += weight . grad[i]: four rows at once.
template <class T, int kVectors>
SNN_HD void add_dots(const Strip<T, kVectors>& weight, const T* const* grad, T* sums, int count) {
  const Four<T> dots = totals(products(weight, grad[0]), products(weight, grad[1]), products(weight, grad[2]),
                              products(weight, grad[3]));
  for (int i = 0; i < count; i++) sums[i] += dots[i];
}

// A strip of the outputs from `output` on, for the events of one block of rows.
template <class T, int kVectors>
void input_strip(const SnnInputGradient& a, int64_t output, const T* block, int64_t rows, const int64_t* start,
                 T* sums) {
  constexpr int64_t columns = Strip<T, kVectors>::kColumns;
  const StripRows<T, kVectors> source(rows, a.outputs, output);
  const T* grad = source.copy(block, rows);
  const int64_t stride = a.inputs * kTile;
  const T* weights = static_cast<const T*>(a.tiles) + output / kTile * stride + output % kTile;
  const uint16_t* row = a.row + start[0];
  for (int64_t j = 0; j < a.inputs; j++) {
    int64_t e = start[j] - start[0];
    const int64_t end = start[j + 1] - start[0];
    if (e == end) continue;
    Strip<T, kVectors> weight;
    weight.set_weights(weights + j * kTile, stride);
    const T* rows_of[4];
    for (; e + 4 <= end; e += 4) {
      for (int i = 0; i < 4; i++) rows_of[i] = grad + row[e + i] * columns;
      add_dots(weight, rows_of, sums + e, 4);
    }
    if (e == end) continue;
    for (int i = 0; i < 4; i++) rows_of[i] = grad + row[std::min(e + i, end - 1)] * columns;
    add_dots(weight, rows_of, sums + e, static_cast<int>(end - e));
  }
}

template <class T> int64_t input_gradient_of(const SnnInputGradient& a) {
  constexpr int64_t columns = Strip<T, kStripVectors>::kColumns;
  const int64_t blocks = (a.rows + a.block_rows - 1) / a.block_rows;
  parallel_for(blocks, a.threads, [&](int64_t k) {
    const int64_t first = k * a.block_rows, rows = std::min(a.block_rows, a.rows - first);
    const int64_t* start = a.start + k * (a.inputs + 1);
    const int64_t events = start[a.inputs] - start[0];
    const Scratch<T> sums(events);
    std::fill(sums.get(), sums.get() + events, T(0));
    for (int64_t output = 0; output < a.outputs; output += columns)
      visit_vectors<T, kStripVectors>(a.outputs - output, [&](auto vectors) {
        input_strip<T, decltype(vectors)::value>(a, output, static_cast<const T*>(a.grad) + first * a.outputs, rows,
                                                 start, sums.get());
      });
    const int64_t* rank = a.rank + start[0];
    for (int64_t e = 0; e < events; e++) static_cast<T*>(a.grad_active)[rank[e]] = sums[e];
  });
  return 0;
}

}  // namespace

int64_t weight_gradient(const SnnWeightGradient& a) {
  return a.dtype == kFloat32 ? weight_gradient_of<float>(a) : weight_gradient_of<double>(a);
}
int64_t input_gradient(const SnnInputGradient& a) {
  return a.dtype == kFloat32 ? input_gradient_of<float>(a) : input_gradient_of<double>(a);
}

}  // namespace SSB_ISA
}  // namespace snn
