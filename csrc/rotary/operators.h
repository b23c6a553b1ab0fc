// Declares rotate_heads, which the CPU operators rotary_embedding and decoder_layer call.
#pragma once

#include "cpu/tensor.h"

namespace peft_ext {

// Writes the rotated q and k to y_q and y_k, whose rows must be contiguous. If `back`, q and k are the gradients of the
// rotated q and k, and rotate_heads writes the gradients of the rotation's inputs.
void rotate_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                  const Tensor& y_q, const Tensor& y_k, bool back);

}  // namespace peft_ext
