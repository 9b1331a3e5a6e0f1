#include "threads.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "simd.h"

namespace skyline {
namespace {

// A job is one 64-bit word: epoch (24 bits), number of tasks (20), next task (20). A thread owns a task once it has advanced
// the word; until that task is counted as done the caller does not return, so what else describes the job stays as it is.
constexpr int kBits = 20;
constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

uint64_t tasks_of(uint64_t job) { return (job >> kBits) & kMask; }
uint64_t next_of(uint64_t job) { return job & kMask; }
bool open(uint64_t job) { return next_of(job) < tasks_of(job); }

// What each thread fetches ahead at most: the least that second-level caches hold, less what the job at hand needs.
constexpr int64_t kAheadBytes = 128 << 10;

void pin(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused in some sandboxes; then the kernel places it
}

}  // namespace

// A thread's way through the memory that is fetched ahead.
class Fetcher {
 public:
  Fetcher(int thread, int threads) : thread_(thread), threads_(threads) {}

  // Asks for a few lines more of `memory`; false if there are none.
  bool fetch(const uint8_t* memory, int64_t bytes) {
    if (memory != memory_) {
      memory_ = memory;
      done_ = 0;
      begin_ = memory + bytes / threads_ * thread_;
      most_ = memory ? std::min(kAheadBytes, bytes / threads_) : 0;
    }
    if (done_ >= most_) return false;
    for (int i = 0; i < kLines; i++) prefetch_l2(begin_ + done_ + 64 * i);
    done_ += 64 * kLines;
    return true;
  }

 private:
  static constexpr int kLines = 4;
  int thread_, threads_;
  const uint8_t *memory_ = nullptr, *begin_ = nullptr;
  int64_t done_ = 0, most_ = 0;
};

struct ThreadPool::State {
  alignas(64) std::atomic<uint64_t> job{0};
  alignas(64) std::atomic<uint64_t> done{0};
  alignas(64) std::atomic<uint32_t> awake{0};  // futex word: 0 while workers may sleep; odd while a step runs
  std::atomic<bool> stopping{false};
  alignas(64) std::atomic<const uint8_t*> ahead{nullptr};
  std::atomic<int64_t> ahead_bytes{0};
  Erased call = nullptr;
  const void* context = nullptr;
  int64_t first = 0;  // what the job's task 0 is to `call`
  uint64_t epoch = 0;
  bool in_step = false;
  Fetcher caller{0, 1};
  pthread_t pinned{};  // the thread that called start, and where it was allowed to run before
  cpu_set_t before{};
  bool is_pinned = false;
  std::vector<std::thread> workers;
  std::mutex in_use;

  void work_on(uint64_t current) {
    while (open(current)) {
      if (job.compare_exchange_weak(current, current + 1, std::memory_order_acq_rel)) {
        call(context, first + static_cast<int64_t>(next_of(current)));
        done.fetch_add(1, std::memory_order_release);
        current = job.load(std::memory_order_acquire);
      }
    }
  }

  // Waits a moment, and uses it.
  void wait(Fetcher& fetcher) {
    const uint8_t* memory = ahead.load(std::memory_order_acquire);
    if (!fetcher.fetch(memory, ahead_bytes.load(std::memory_order_relaxed))) _mm_pause();
  }

  // Does so many tasks together with the workers.
  void share_out(int64_t count) {
    done.store(0, std::memory_order_relaxed);
    epoch = (epoch + 1) & 0xFFFFFF;
    const uint64_t mine = epoch << (2 * kBits) | static_cast<uint64_t>(count) << kBits;
    job.store(mine, std::memory_order_release);
    if (!in_step) {  // even + 2: a sleeper wakes, looks for work, and sleeps again
      awake.fetch_add(2, std::memory_order_release);
      syscall(SYS_futex, &awake, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }
    work_on(mine);
    // The last tasks are in other hands; where cores are scarce, those may need this one.
    for (int spins = 1; done.load(std::memory_order_acquire) != static_cast<uint64_t>(count); spins++) {
      wait(caller);
      if (spins % 16384 == 0) sched_yield();
    }
  }

  void worker(int cpu, int index, int threads) {
    pin(cpu);
    Fetcher fetcher(index, threads);
    int spins = 0;
    while (!stopping.load(std::memory_order_relaxed)) {
      uint64_t current = job.load(std::memory_order_acquire);
      if (open(current)) {
        work_on(current);
        spins = 0;
      } else if (uint32_t word = awake.load(std::memory_order_acquire); word & 1) {
        // Another process may need this core to give us the next step: offer it now and then.
        if (++spins % 4096 == 0) sched_yield();
        wait(fetcher);
      } else {
        syscall(SYS_futex, &awake, FUTEX_WAIT_PRIVATE, word, nullptr, nullptr, 0);
      }
    }
  }

  void wake() {
    awake.fetch_add(1, std::memory_order_release);
    syscall(SYS_futex, &awake, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }
};

ThreadPool::ThreadPool() : state_(std::make_unique<State>()) {}
ThreadPool::~ThreadPool() { stop(); }

ThreadPool& ThreadPool::get() {
  static ThreadPool* pool = new ThreadPool;  // never destroyed: workers may outlive the interpreter's last statements
  return *pool;
}

void ThreadPool::start(const std::vector<int>& cpus) {
  stop();
  std::lock_guard lock(state_->in_use);
  size_ = cpus.empty() ? 1 : static_cast<int>(cpus.size());
  state_->caller = Fetcher(0, size_);
  if (!cpus.empty() && cpus[0] >= 0) {
    state_->pinned = pthread_self();
    state_->is_pinned = pthread_getaffinity_np(state_->pinned, sizeof state_->before, &state_->before) == 0;
    pin(cpus[0]);
  }
  for (int i = 1; i < size_; i++) state_->workers.emplace_back(&State::worker, state_.get(), cpus[i], i, size_);
}

void ThreadPool::stop() {
  std::lock_guard lock(state_->in_use);
  state_->stopping = true;
  state_->awake.fetch_add(2, std::memory_order_release);
  syscall(SYS_futex, &state_->awake, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  for (auto& worker : state_->workers) worker.join();
  state_->workers.clear();
  // Or the next pool would find one core, and its threads inherit it.
  if (state_->is_pinned && pthread_equal(state_->pinned, pthread_self()))
    pthread_setaffinity_np(state_->pinned, sizeof state_->before, &state_->before);
  state_->is_pinned = false;
  state_->stopping = false;
  size_ = 1;
}

void ThreadPool::begin_step() {
  if (state_->in_step || size_ == 1) return;
  state_->in_step = true;
  state_->wake();
}

void ThreadPool::end_step() {
  if (!state_->in_step) return;
  state_->in_step = false;
  state_->awake.fetch_add(1, std::memory_order_release);
}

ThreadPool::Taken* ThreadPool::none_taken(int64_t runs) {
  static thread_local std::vector<Taken> taken;
  if (taken.size() < static_cast<size_t>(runs)) taken = std::vector<Taken>(runs);
  for (int64_t i = 0; i < runs; i++) taken[i].tasks.store(0, std::memory_order_relaxed);
  return taken.data();
}

void ThreadPool::fetch_ahead(const uint8_t* memory, int64_t bytes) {
  state_->ahead_bytes.store(bytes, std::memory_order_relaxed);
  state_->ahead.store(memory, std::memory_order_release);
}

void ThreadPool::run_erased(int64_t count, Erased call, const void* context) {
  State& state = *state_;
  std::unique_lock lock(state.in_use, std::try_to_lock);
  if (!lock.owns_lock()) {
    for (int64_t i = 0; i < count; i++) call(context, i);
    return;
  }
  state.call = call;
  state.context = context;
  for (state.first = 0; state.first < count; state.first += kMask) state.share_out(std::min<int64_t>(count - state.first, kMask));
}

}  // namespace skyline
