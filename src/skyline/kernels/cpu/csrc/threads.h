// The thread pool of all CPU kernels.
//
// One pool a process. The thread that calls `run` works too, so a pool of n threads starts n - 1. Between the kernels of a
// step the workers spin, because a futex costs more than a small kernel; outside of steps they sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace skyline {

class ThreadPool {
 public:
  static ThreadPool& get();

  // Ends the workers there are and starts one for each of `cpus` but the first, pinned to it (-1: not pinned).
  void start(const std::vector<int>& cpus);
  void stop();
  int size() const { return size_; }

  // Workers spin between begin_step and end_step.
  void begin_step();
  void end_step();

  // While threads wait for each other or for the next job of a step, they fetch the beginning of `memory` into their caches,
  // supposing that each goes through one run of it; nullptr: nothing. The memory is not read: it may be gone by then.
  void fetch_ahead(const uint8_t* memory, int64_t bytes);

  static constexpr int64_t kTasks = 16;  // a thread: with more of them, one that is held up costs less

  // Calls task(i) for each i in [0, count), on all threads, in no order; returns when all are done. A task may not throw,
  // nor call `run`. If another thread is using the pool, this one computes alone.
  template <class Task>
  void run(int64_t count, const Task& task) {
    if (count <= 0) return;
    if (count == 1 || size_ == 1) {
      for (int64_t i = 0; i < count; i++) task(i);
      return;
    }
    run_erased(count, [](const void* context, int64_t i) { (*static_cast<const Task*>(context))(i); }, &task);
  }

  // As `run`, of tasks [0, count) that lie side by side in memory, which is read faster in order: each thread goes through one run of
  // them, then helps the others. Several times over, run by run: task(time, i, next), where next is the task that comes after, or -1.
  template <class Task>
  void run_in_order(int64_t times, int64_t count, const Task& task) {
    const int64_t runs = std::min<int64_t>(size_, count);
    Taken* taken = none_taken(runs);
    run(runs, [=, &task](int64_t mine) {
      for (int64_t k = 0; k < runs; k++) {
        const int64_t r = (mine + k) % runs, begin = count * r / runs, length = count * (r + 1) / runs - begin, all = times * length;
        for (int64_t i; (i = taken[r].tasks.fetch_add(1, std::memory_order_relaxed)) < all;)
          task(i / length, begin + i % length, i + 1 < all ? begin + (i + 1) % length : -1);
      }
    });
  }

  // As `run`, with [0, length) cut into ranges of at least `grain`: task(begin, end). The cut depends on `length` and the
  // number of threads only.
  template <class Task>
  void run_ranges(int64_t length, int64_t grain, const Task& task) {
    if (length <= 0) return;
    // Four ranges a thread, so that a thread that is held up leaves its share to the others.
    int64_t most = size_ == 1 ? 1 : 4 * size_, fit = length / (grain < 1 ? 1 : grain);
    int64_t pieces = fit < 1 ? 1 : (fit < most ? fit : most);
    run(pieces, [&](int64_t i) { task(length * i / pieces, length * (i + 1) / pieces); });
  }

 private:
  using Erased = void (*)(const void*, int64_t);
  struct State;
  struct alignas(64) Taken {
    std::atomic<int64_t> tasks;
  };
  static Taken* none_taken(int64_t runs);  // the calling thread's, zeros
  ThreadPool();
  ~ThreadPool();
  void run_erased(int64_t count, Erased call, const void* context);
  std::unique_ptr<State> state_;
  int size_ = 1;
};

}  // namespace skyline
