// Tasks over torch's threads (the library is loaded after torch and shares its OpenMP runtime), and vectors.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../portable.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a call: everything here is inlined

namespace snn {
namespace SSB_ISA {

// Runs task(i) for i in [0, count). Tasks write disjoint results, so the number of threads cannot change a bit.
// All that a task may throw is std::bad_alloc; it must not leave a thread of OpenMP, so it is thrown again here.
template <class Task> inline void parallel_for(int64_t count, int threads, Task task) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  std::atomic<bool> failed{false};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; i++) {
    try {
      if (!failed.load(std::memory_order_relaxed)) task(i);
    } catch (...) {
      failed.store(true, std::memory_order_relaxed);
    }
  }
  if (failed.load()) throw std::bad_alloc();
}

// One register of T. (Wider ones, which the compiler would have to split, it keeps in memory.)
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <class T> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int kVectorLanes = kVectorBytes / sizeof(T);

template <class T> SNN_HD Vector<T> load(const T* p) { return *reinterpret_cast<const Vector<T>*>(p); }
template <class T> SNN_HD void store(T* p, const Vector<T>& v) { *reinterpret_cast<Vector<T>*>(p) = v; }

// Uninitialised scratch memory on a cache line boundary.
template <class T> class Scratch {
 public:
  explicit Scratch(int64_t count) {
    size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// Working memory that may grow, uninitialised: on the stack as long as `kLocal` elements are enough.
template <class T, int64_t kLocal> class Buffer {
 public:
  T* room(int64_t count) {  // what was in it is lost
    if (count > room_) {
      heap_ = std::make_unique<Scratch<T>>(count);
      room_ = count;
    }
    return get();
  }
  T* get() { return heap_ ? heap_->get() : local_; }

 private:
  alignas(64) T local_[kLocal];
  std::unique_ptr<Scratch<T>> heap_;
  int64_t room_ = kLocal;
};

}  // namespace SSB_ISA
}  // namespace snn
