// How many threads a loop of a call has: one where the call is itself a part of a loop that has them all.
#pragma once

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

inline int64_t loop_threads() { return within_a_loop() ? 1 : static_cast<int64_t>(torch::stable::get_num_threads()); }

}  // namespace peft_ext
