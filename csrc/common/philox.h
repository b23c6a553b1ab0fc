// Counter-based dropout: Philox4x32-7, one 16-bit draw per element, as peft_ext/reference/philox.py defines it.
// Element i takes draw i % 8 of the counter block i / 8, so any range of a mask can be made anywhere, in any order.
// The code that makes draws is philox_impl.h, compiled per instruction set.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

// What a kernel needs to drop elements. keep() is draw >= threshold; kept elements are scaled by 1 / (1 - p).
struct Dropout {
  bool active = false;
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;
  float scale = 1.0f;
};

}  // namespace peft_ext
