// The product of few tokens and a packed weight, x Wᵀ, with the weight decoded in registers.
#pragma once

#include "weight/frozen_weight.h"

namespace peft_ext {

// Returns whether skinny_product accepts `tokens` tokens of dtype `type` for `weight` on the current CPU path.
bool skinny_accepts(const FrozenWeight& weight, ScalarType type, int64_t tokens);

// Returns x [T, K] Wᵀ in float32, [T, N]. x is contiguous.
Tensor skinny_product(const char* op, const Tensor& x, const FrozenWeight& weight);

}  // namespace peft_ext
