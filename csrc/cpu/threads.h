// Loops on all threads, and how many a loop of a call has: one where the call is itself a part of a loop that has them
// all.
#pragma once

#include <exception>
#include <mutex>

#include <torch/csrc/stable/ops.h>

#include "cpu/tensor.h"

namespace peft_ext {

inline bool& within_a_loop() {
  static thread_local bool within = false;
  return within;
}

// Stands in a part of a loop whose calls have loops of their own.
struct WithinALoop {
  const bool before = within_a_loop();
  WithinALoop() { within_a_loop() = true; }
  WithinALoop(const WithinALoop&) = delete;
  WithinALoop& operator=(const WithinALoop&) = delete;
  ~WithinALoop() { within_a_loop() = before; }
};

// f(begin, end) over parts of [begin, end) of `grain` at least, on all threads. What the first that throws says comes
// out: PyTorch's own loop has words of its own for it, and trainers look for those of an allocator.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr thrown;
  std::mutex one;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      f(from, to);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(one);
      if (thrown == nullptr) thrown = std::current_exception();
    }
  });
  if (thrown != nullptr) std::rethrow_exception(thrown);
}

inline int64_t loop_threads() { return within_a_loop() ? 1 : static_cast<int64_t>(torch::stable::get_num_threads()); }

}  // namespace peft_ext
