// The product of few tokens and a packed weight, x Wᵀ, without a decoded copy of the weight in memory.
#pragma once

#include <functional>

#include "weight/frozen_weight.h"

namespace peft_ext {

// The product of few tokens with one weight, y = x Wᵀ [T, N] in float32, which threads compute in parts.
struct FewTokensProduct {
  Tensor y;
  int64_t units = 0;                                         // number of units of W, which threads divide; see by_rows
  int64_t work = 0;                                          // number of multiplications that one unit takes
  bool by_rows = true;                                       // whether a unit is exactly one row of W
  std::function<void(int64_t begin, int64_t end)> multiply;  // multiplies the units [begin, end) with x
  std::vector<Tensor> held;  // tensors whose memory `multiply` uses; `held` keeps this memory alive
};

// Returns whether skinny_product accepts `tokens` tokens of dtype `type` for `weight` on the current CPU path.
bool skinny_accepts(const FrozenWeight& weight, ScalarType type, int64_t tokens);

// Prepares the product of a contiguous x [T, K] and a packed weight. x and the weight must live as long as the result.
FewTokensProduct skinny_parts(const char* op, const Tensor& x, const FrozenWeight& weight);

// Returns x [T, K] Wᵀ in float32, [T, N]. x is contiguous.
Tensor skinny_product(const char* op, const Tensor& x, const FrozenWeight& weight);

}  // namespace peft_ext
