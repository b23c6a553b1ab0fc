// Parallel loops, and the number of threads that a loop in a call may use. A loop within a loop that already uses all
// threads has one thread.
#pragma once

#include <exception>
#include <mutex>

#include <torch/csrc/stable/ops.h>

#include "cpu/operator_call.h"
#include "cpu/tensor.h"

namespace peft_ext {

inline bool& within_a_loop() {
  static thread_local bool within = false;
  return within;
}

// While an object of this type lives in a loop body, the loops of the functions that the body calls use one thread.
struct WithinALoop {
  const bool before = within_a_loop();
  WithinALoop() { within_a_loop() = true; }
  WithinALoop(const WithinALoop&) = delete;
  WithinALoop& operator=(const WithinALoop&) = delete;
  ~WithinALoop() { within_a_loop() = before; }
};

// Calls f(begin, end) on all threads for parts of [begin, end) of at least `grain`. The first exception is rethrown
// with its own message: PyTorch's loop would replace the message, and trainers look for the allocator's message. All
// threads run the calling thread's CPU path.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
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

inline int64_t loop_threads() { return within_a_loop() ? 1 : static_cast<int64_t>(torch::stable::get_num_threads()); }

}  // namespace peft_ext
