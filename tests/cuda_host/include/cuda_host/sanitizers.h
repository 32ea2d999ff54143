// What the sanitizers have to be told. Without them, all of this is nothing.
#pragma once

#if defined(__has_feature)  // clang's way to ask; g++ defines the macros
#define CUDA_HOST_FEATURE(name) __has_feature(name)
#else
#define CUDA_HOST_FEATURE(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || CUDA_HOST_FEATURE(address_sanitizer)
#define CUDA_HOST_ASAN 1
#else
#define CUDA_HOST_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__) || CUDA_HOST_FEATURE(thread_sanitizer)
#define CUDA_HOST_TSAN 1
#else
#define CUDA_HOST_TSAN 0
#endif

#if CUDA_HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// For the first frame of a fiber: it never returns, so nobody would clear what it marks on the stack.
#define CUDA_HOST_FIRST_FRAME __attribute__((no_sanitize("address")))
#else
#define CUDA_HOST_FIRST_FRAME
#endif

#if CUDA_HOST_TSAN
#include <sanitizer/tsan_interface.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
// For what threads of a block do in the harness. The race detector must see the kernel's memory accesses only: the
// harness's are ordered by the stack switches, which it is told to ignore.
#define CUDA_HOST_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define CUDA_HOST_UNSEEN
#endif

namespace cuda_host {

// Everything before `release` of a token happens before everything after a later `acquire` of it.
CUDA_HOST_UNSEEN inline void release(const char& token) {
#if CUDA_HOST_TSAN
  __tsan_release(const_cast<char*>(&token));
#endif
  (void)token;
}
CUDA_HOST_UNSEEN inline void acquire(const char& token) {
#if CUDA_HOST_TSAN
  __tsan_acquire(const_cast<char*>(&token));
#endif
  (void)token;
}

#if CUDA_HOST_TSAN
// To be unordered for the race detector, two blocks need fibers of their own, which are slow to make (about 1 ms and
// 1 MB each), and static shared memory of their own, which is thread-local. So many threads and blocks at a time.
constexpr unsigned kUnorderedThreads = 1024, kUnorderedBlocks = 16;

// An OS thread that lends its thread-local variables to blocks. It lives as long as the process.
class Worker {
 public:
  Worker() {
    std::thread([this] { serve(); }).detach();
  }
  void run(const std::function<void()>& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = &job;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !job_; });
  }

 private:
  void serve() {
    // Allocates the thread-local variables: a kernel's first access would count as a write by the thread that did it.
    static thread_local volatile char first;
    first = first + 1;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return job_; });
      (*job_)();
      job_ = nullptr;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void()>* job_ = nullptr;
};

template <class Job> void run_with_own_shared_memory(unsigned slot, Job job) {
  static auto& workers = *new std::vector<std::unique_ptr<Worker>>;  // never destroyed: its threads outlive main
  while (workers.size() <= slot) workers.push_back(std::make_unique<Worker>());
  workers[slot]->run(job);
}
#else
constexpr unsigned kUnorderedThreads = 0, kUnorderedBlocks = 1;
template <class Job> void run_with_own_shared_memory(unsigned, Job job) { job(); }
#endif

}  // namespace cuda_host
