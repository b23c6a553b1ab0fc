// Parallel loops, and the number of threads that a loop may use.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/operator_call.h"
#include "cpu/tensor.h"

namespace peft_ext {

inline bool& within_a_loop() {
  static thread_local bool within = false;
  return within;
}

// While a thread has a WithinALoop object, parallel_for on this thread uses only this thread. The body of a loop that
// already uses all threads makes a WithinALoop object.
struct WithinALoop {
  const bool before = within_a_loop();
  WithinALoop() { within_a_loop() = true; }
  WithinALoop(const WithinALoop&) = delete;
  WithinALoop& operator=(const WithinALoop&) = delete;
  ~WithinALoop() { within_a_loop() = before; }
};

inline int64_t loop_threads() { return within_a_loop() ? 1 : static_cast<int64_t>(torch::stable::get_num_threads()); }

// Number of parallel loops that woke other threads since the library was loaded.
inline std::atomic<uint64_t> parallel_loops{0};

// Calls f(begin, end) in parallel for parts of [begin, end): at most one part per thread, and at most ceil((end -
// begin) / grain) parts. A loop of at most `grain` iterations, and a loop on a thread with a WithinALoop object, runs
// on the calling thread alone. If f throws, the first exception is rethrown with its own message: PyTorch's loop would
// replace the message, and trainers look for the allocator's message. All threads use the CPU path of the calling
// thread.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= grain || loop_threads() == 1) return f(begin, end);
  parallel_loops.fetch_add(1, std::memory_order_relaxed);
  std::exception_ptr thrown;
  std::mutex one;
  const Isa isa = current_isa();
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    const ThreadInCall part(isa);
    try {
      f(from, to);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(one);
      if (thrown == nullptr) thrown = std::current_exception();
    }
  });
  if (thrown != nullptr) std::rethrow_exception(thrown);
}

// Several loops that run as one parallel loop.
class Loops {
 public:
  // Adds a loop that calls f(first, last) for parts of [0, count). work: the work of one iteration, in a unit that all
  // loops of this object share.
  void add(int64_t count, int64_t work, std::function<void(int64_t, int64_t)> f) {
    if (count <= 0) return;
    loops_.push_back({count, std::max<int64_t>(1, work), total_, std::move(f)});
    total_ += count * loops_.back().work;
  }
  // The work of all iterations.
  int64_t total() const { return total_; }
  // Runs the loops. grain: the smallest work of a thread, in the unit of `work`.
  void run(int64_t grain) const {
    parallel_for(0, total_, grain, [&](int64_t begin, int64_t end) { run_part(begin, end); });
  }
  // Runs the iterations whose first unit of work is in the range [begin, end) of the total work.
  void run_part(int64_t begin, int64_t end) const {
    for (const Loop& loop : loops_) {
      const int64_t first = loop.iteration(begin), last = loop.iteration(end);
      if (first < last) loop.f(first, last);
    }
  }

 private:
  struct Loop {
    int64_t count, work, start;
    std::function<void(int64_t, int64_t)> f;
    int64_t iteration(int64_t at) const { return at <= start ? 0 : std::min(count, (at - start + work - 1) / work); }
  };
  std::vector<Loop> loops_;
  int64_t total_ = 0;
};

}  // namespace peft_ext
