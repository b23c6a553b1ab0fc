// The CPU function of rotary positions that the operator decoder_layer calls.
#pragma once

#include "cpu/tensor.h"

namespace peft_ext {

// Writes the rotated q and k to y_q and y_k, whose rows are contiguous.
void rotate_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                  const Tensor& y_q, const Tensor& y_k, bool back);

}  // namespace peft_ext
