// The product of few tokens and a packed weight, x Wᵀ, without a decoded copy of the weight in memory.
#pragma once

#include <functional>

#include "weight/frozen_weight.h"

namespace peft_ext {

// The product of few tokens with one weight, y = x Wᵀ [T, N] in float32, which threads compute in parts. The functions
// read the weight's memory, and hold none of its values.
struct FewTokensProduct {
  int64_t units = 0;    // number of units of W, which threads divide; see by_rows
  int64_t work = 0;     // number of multiplications that one unit takes
  bool by_rows = true;  // whether a unit is exactly one row of W
  bool wide = false;    // whether `order`, or `multiply` without `order`, reads x in float32; if not, in x's own dtype
  int64_t room = 0;     // bytes that `order` writes
  // Copies x to `room` in the order in which `multiply` reads it; empty if `multiply` reads x itself.
  std::function<void(const void* x, void* room)> order;
  // Multiplies the units [begin, end) with x, which is the `room` of `order`.
  std::function<void(const void* x, float* y, int64_t begin, int64_t end)> multiply;
};

// Returns whether skinny_product accepts `tokens` tokens of dtype `type` for `weight` on the current CPU path.
bool skinny_accepts(const FrozenWeight& weight, ScalarType type, int64_t tokens);

// Returns the product of `tokens` tokens of dtype `type` and a packed weight, which must live as long as the result.
FewTokensProduct skinny_parts(const char* op, ScalarType type, int64_t tokens, const FrozenWeight& weight);

// Returns x [T, K] Wᵀ in float32, [T, N]. x is contiguous.
Tensor skinny_product(const char* op, const Tensor& x, const FrozenWeight& weight);

}  // namespace peft_ext
