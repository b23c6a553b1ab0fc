// Counter-based dropout: Philox4x32-7 with one 16-bit draw per element, defined in peft_ext/reference/philox.py.
// Element i takes draw i % 8 of counter block i / 8, so that any range of a mask can be computed in any order. The CPU
// code that computes the draws is in cpu/philox_impl.h, which is compiled for each instruction set.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

// Parameters of dropout. An element is kept if the element's draw is at least `threshold`. Kept elements are multiplied
// by `scale`, which is 1 / (1 - p) for the dropout rate p.
struct Dropout {
  bool active = false;
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;
  float scale = 1.0f;
};

}  // namespace peft_ext
