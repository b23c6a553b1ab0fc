// Few tokens against an NF4 weight, which is decoded in registers.
#pragma once

#include "weight/frozen_weight.h"

namespace peft_ext {

// Whether skinny_product accepts this many tokens of x's type against this weight on the CPU path in use.
bool skinny_accepts(const FrozenWeight& weight, ScalarType type, int64_t tokens);

// x [T, K] Wᵀ in float32, [T, N]. x is contiguous.
Tensor skinny_product(const char* op, const Tensor& x, const FrozenWeight& weight);

}  // namespace peft_ext
