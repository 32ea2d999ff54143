// One block: its threads, who may run next, and where they wait for each other.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "fiber.h"
#include "types.h"

namespace cuda_host {

// Which of the threads or blocks that can run goes next: the first, or with a seed any (splitmix64).
class Schedule {
 public:
  Schedule() {
    const char* seed = std::getenv("SNN_CUDA_HOST_SEED");
    random = seed && *seed;
    if (random) state_ = std::strtoull(seed, nullptr, 10);
  }
  uint64_t pick(uint64_t below) {
    if (!random) return 0;
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (z ^ (z >> 31)) % below;
  }

  bool random;

 private:
  uint64_t state_ = 0;
};

struct LaunchShape {
  dim3 grid, block;
  size_t dynamic_shared;
};

enum class State : uint8_t { fresh, queued, running, at_barrier, in_collective, done };
enum class Operation : uint8_t { sync, ballot, any, all, match, shuffle };

struct Thread {
  uint3 index;
  unsigned rank = 0;  // in the block
  State state = State::fresh;
  Fiber* fiber = nullptr;
  Site waits_at{};
  // The collective in which it takes part.
  Operation operation = Operation::sync;
  bool source_missing = false;
  unsigned mask = 0, source = 0;
  uint64_t value = 0, result = 0;
  // Tokens for the race detector: its arrival in a collective, and the end of those in which it is the first lane.
  char arrived = 0, finished = 0;
  const char* finish = nullptr;
};

struct Votes {
  unsigned threads, yes;
};

class Block {
 public:
  // `tokens` order the threads with the launch: they begin after the first and end before the second.
  using Kernel = void (*)(const void* arguments);
  Block(const LaunchShape& shape, uint3 index, Kernel kernel, const void* arguments, char* tokens);

  // Runs all threads to their end, or throws a Failure.
  void run(Schedule& schedule, FiberPool& fibers);

  // What running threads ask for.
  Votes barrier(const Site& site, bool vote);
  uint64_t collective(Operation operation, const Site& site, unsigned mask, uint64_t value, unsigned source = 0);
  void yield();
  void yield_if_random();
  unsigned live_lanes() const;
  [[noreturn]] void fail(cudaError_t code, const char* format, ...) __attribute__((format(printf, 3, 4)));

  const LaunchShape shape;
  const uint3 index;
  void* shared() const { return shared_.get(); }

 private:
  struct Warp {
    unsigned lanes = 0, exited = 0, waiting = 0;
  };
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  static void thread_main();
  void exit_thread();
  void open_barrier();
  void try_to_finish(unsigned warp, Operation operation, unsigned mask);
  uint64_t result_of(const Thread* lanes, unsigned lane, unsigned taking);
  void enqueue(Thread& thread);
  Thread& dequeue(Schedule& schedule);
  std::string deadlock() const;

  const Kernel kernel_;
  const void* const arguments_;
  char* const tokens_;
  std::unique_ptr<void, Free> shared_;
  // Raw arrays: what running threads call must not be seen by the race detector, as std::vector would be.
  const unsigned size_;
  std::unique_ptr<Thread[]> threads_;
  std::unique_ptr<unsigned[]> queue_;
  unsigned queue_head_ = 0, queued_ = 0;
  std::unique_ptr<Warp[]> warps_;

  bool random_ = false;
  unsigned done_ = 0, arrived_ = 0, yes_ = 0, round_ = 0;
  Site barrier_site_{};
  Votes votes_{};
  char barrier_tokens_[2] = {};  // of even and odd rounds: a fast thread may be one round ahead

  cudaError_t failure_code_ = cudaSuccess;
  char failure_[512] = {};
};

// Blocks run one at a time, so one of each will do.
inline Block* current_block = nullptr;
inline Thread* current_thread = nullptr;

inline uint3 unflatten(uint64_t rank, const dim3& size) {
  return {unsigned(rank % size.x), unsigned(rank / size.x % size.y), unsigned(rank / size.x / size.y)};
}

inline Block::Block(const LaunchShape& shape, uint3 index, Kernel kernel, const void* arguments, char* tokens)
    : shape(shape), index(index), kernel_(kernel), arguments_(arguments), tokens_(tokens),
      size_(shape.block.x * shape.block.y * shape.block.z), threads_(new Thread[size_]), queue_(new unsigned[size_]),
      warps_(new Warp[(size_ + 31) / 32]) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, shape.dynamic_shared)) throw std::bad_alloc();  // its end is exact for ASan
  shared_.reset(memory);
  std::memset(memory, 0xff, shape.dynamic_shared);  // NaN: a kernel may not rely on what is there
  for (unsigned rank = 0; rank < size_; rank++) {
    threads_[rank].rank = rank;
    threads_[rank].index = unflatten(rank, shape.block);
    warps_[rank / 32].lanes |= 1u << rank % 32;
    queue_[rank] = rank;
  }
  queued_ = size_;
}

inline void Block::run(Schedule& schedule, FiberPool& fibers) {
  release(tokens_[0]);
  current_block = this;
  random_ = schedule.random;
  while (done_ < size_) {
    if (!queued_) throw Failure{cudaErrorLaunchTimeout, deadlock()};
    Thread& thread = dequeue(schedule);
    if (thread.state == State::fresh) {
      thread.fiber = fibers.take();
      thread.fiber->start(thread_main);
    }
    thread.state = State::running;
    current_thread = &thread;
    thread.fiber->resume();
    current_thread = nullptr;
    if (failure_code_ != cudaSuccess) {
      acquire(tokens_[1]);
      throw Failure{failure_code_, failure_};
    }
    if (thread.state == State::done && !CUDA_HOST_TSAN) fibers.give_back(thread.fiber);
  }
  current_block = nullptr;
}

CUDA_HOST_UNSEEN CUDA_HOST_FIRST_FRAME inline void Block::thread_main() {
  current_thread->fiber->entered();
  Block* block = current_block;
  acquire(block->tokens_[0]);
  block->kernel_(block->arguments_);
  block->exit_thread();
  release(block->tokens_[1]);
  current_thread->fiber->suspend(true);
  std::abort();
}

// Threads that have returned hold up neither barriers nor collectives.
CUDA_HOST_UNSEEN inline void Block::exit_thread() {
  Thread& me = *current_thread;
  me.state = State::done;
  done_++;
  if (arrived_ && arrived_ + done_ == size_) open_barrier();
  Warp& warp = warps_[me.rank / 32];
  warp.exited |= 1u << me.rank % 32;
  for (unsigned lane = 0; warp.waiting && lane < 32; lane++) {
    if (!(warp.waiting >> lane & 1)) continue;
    const Thread& other = threads_[me.rank / 32 * 32 + lane];
    try_to_finish(me.rank / 32, other.operation, other.mask);
  }
}

CUDA_HOST_UNSEEN inline void Block::enqueue(Thread& thread) {
  thread.state = State::queued;
  queue_[(queue_head_ + queued_++) % size_] = thread.rank;
}

inline Thread& Block::dequeue(Schedule& schedule) {
  const unsigned head = queue_head_;
  std::swap(queue_[head], queue_[(head + schedule.pick(queued_)) % size_]);
  queue_head_ = (head + 1) % size_;
  queued_--;
  return threads_[queue_[head]];
}

CUDA_HOST_UNSEEN inline void Block::yield() {
  enqueue(*current_thread);
  current_thread->fiber->suspend();
}

CUDA_HOST_UNSEEN inline void Block::yield_if_random() {
  if (random_) yield();
}

CUDA_HOST_UNSEEN inline Votes Block::barrier(const Site& site, bool vote) {
  Thread& me = *current_thread;
  if (arrived_ && !barrier_site_.same_as(site))
    fail(cudaErrorLaunchFailure, "divergent barrier: some threads wait in %s at %s:%d, this one in %s at %s:%d",
         barrier_site_.what, barrier_site_.file, barrier_site_.line, site.what, site.file, site.line);
  barrier_site_ = me.waits_at = site;
  const char& token = barrier_tokens_[round_ % 2];
  release(token);
  arrived_++;
  yes_ += vote;
  if (arrived_ + done_ == size_) {
    open_barrier();
  } else {
    me.state = State::at_barrier;
    me.fiber->suspend();
  }
  acquire(token);
  return votes_;
}

CUDA_HOST_UNSEEN inline void Block::open_barrier() {
  votes_ = {arrived_, yes_};
  arrived_ = yes_ = 0;
  round_++;
  for (unsigned rank = 0; rank < size_; rank++)
    if (threads_[rank].state == State::at_barrier) enqueue(threads_[rank]);
}

CUDA_HOST_UNSEEN inline uint64_t Block::collective(Operation operation, const Site& site, unsigned mask,
                                                   uint64_t value, unsigned source) {
  Thread& me = *current_thread;
  const unsigned lane = me.rank % 32;
  if (!(mask >> lane & 1))
    fail(cudaErrorLaunchFailure, "%s at %s:%d: lane %u is not in its own mask %08x", site.what, site.file, site.line,
         lane, mask);
  me.operation = operation;
  me.waits_at = site;
  me.mask = mask;
  me.value = value;
  me.source = source;
  me.source_missing = false;
  me.state = State::in_collective;
  warps_[me.rank / 32].waiting |= 1u << lane;
  release(me.arrived);
  try_to_finish(me.rank / 32, operation, mask);
  if (me.state == State::in_collective) me.fiber->suspend();
  acquire(*me.finish);
  if (me.source_missing)
    fail(cudaErrorLaunchFailure, "%s at %s:%d reads lane %u, which takes no part in it", site.what, site.file,
         site.line, source);
  return me.result;
}

// Ends a collective if all lanes of its mask are in it that have not returned. Lanes that are elsewhere leave it
// pending; if they never come, that is a deadlock.
CUDA_HOST_UNSEEN inline void Block::try_to_finish(unsigned warp, Operation operation, unsigned mask) {
  Warp& w = warps_[warp];
  Thread* lanes = &threads_[warp * 32];
  const unsigned taking = mask & w.lanes & ~w.exited;
  if ((w.waiting & taking) != taking) return;
  for (unsigned rest = taking; rest; rest &= rest - 1) {
    const Thread& lane = lanes[__builtin_ctz(rest)];
    if (lane.operation != operation || lane.mask != mask) return;
  }
  const char& finished = lanes[__builtin_ctz(taking)].finished;
  for (unsigned rest = taking; rest; rest &= rest - 1) acquire(lanes[__builtin_ctz(rest)].arrived);
  release(finished);
  for (unsigned rest = taking; rest; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest);
    lanes[lane].finish = &finished;
    lanes[lane].source_missing = operation == Operation::shuffle && !(taking >> lanes[lane].source & 1);
    if (!lanes[lane].source_missing) lanes[lane].result = result_of(lanes, lane, taking);
  }
  w.waiting &= ~taking;
  for (unsigned rest = taking; rest; rest &= rest - 1) {
    Thread& lane = lanes[__builtin_ctz(rest)];
    if (&lane == current_thread)
      lane.state = State::running;
    else
      enqueue(lane);
  }
}

CUDA_HOST_UNSEEN inline uint64_t Block::result_of(const Thread* lanes, unsigned lane, unsigned taking) {
  const Operation operation = lanes[lane].operation;
  if (operation == Operation::sync) return 0;
  if (operation == Operation::shuffle) return lanes[lanes[lane].source].value;
  unsigned agreeing = 0;
  for (unsigned rest = taking; rest; rest &= rest - 1) {
    const unsigned other = __builtin_ctz(rest);
    const bool agrees = operation == Operation::match ? lanes[other].value == lanes[lane].value : lanes[other].value;
    agreeing |= unsigned(agrees) << other;
  }
  if (operation == Operation::any) return agreeing != 0;
  if (operation == Operation::all) return agreeing == taking;
  return agreeing;
}

CUDA_HOST_UNSEEN inline unsigned Block::live_lanes() const {
  const Warp& warp = warps_[current_thread->rank / 32];
  return warp.lanes & ~warp.exited;
}

// The scheduler throws, on its own stack: nothing is unwound on a fiber's.
CUDA_HOST_UNSEEN inline void Block::fail(cudaError_t code, const char* format, ...) {
  const uint3 t = current_thread->index;
  va_list values;
  va_start(values, format);
  const int length = std::vsnprintf(failure_, sizeof failure_, format, values);
  va_end(values);
  if (length > 0 && size_t(length) < sizeof failure_)
    std::snprintf(failure_ + length, sizeof failure_ - length, " [thread (%u,%u,%u) of block (%u,%u,%u)]", t.x, t.y,
                  t.z, index.x, index.y, index.z);
  failure_code_ = code;
  release(tokens_[1]);
  current_thread->fiber->suspend();
  std::abort();
}

// Where the threads are stuck: one line for each run of neighbours that wait alike.
inline std::string Block::deadlock() const {
  char line[400];
  std::snprintf(line, sizeof line, "deadlock in block (%u,%u,%u), %u of %u threads have returned", index.x, index.y,
                index.z, done_, size_);
  std::string text = line;
  const auto alike = [](const Thread& a, const Thread& b) {
    return a.state == b.state && a.waits_at.same_as(b.waits_at) && (a.state == State::at_barrier || a.mask == b.mask);
  };
  unsigned lines = 0;
  for (unsigned first = 0, last; first < size_ && lines < 16; first = last + 1) {
    for (last = first; last + 1 < size_ && alike(threads_[first], threads_[last + 1]);) last++;
    const Thread& a = threads_[first];
    const uint3 t = a.index, u = threads_[last].index;
    if (a.state == State::done) continue;
    std::snprintf(line, sizeof line, "\n  threads (%u,%u,%u) to (%u,%u,%u) wait in %s at %s:%d", t.x, t.y, t.z, u.x,
                  u.y, u.z, a.waits_at.what, a.waits_at.file, a.waits_at.line);
    text += line;
    std::snprintf(line, sizeof line, ", mask %08x", a.mask);
    if (a.state == State::in_collective) text += line;
    lines++;
  }
  return text;
}

}  // namespace cuda_host
