// What the CPU's glue and the GPU's share.
#pragma once

#include "common/tensor_calls.h"

namespace peft_ext {

// A gradient of ia3_l, [N], [N, 1] or [1, N], in its shape and type.
inline torch::stable::Tensor like(const torch::stable::Tensor& gradient, const torch::stable::Tensor& ia3_l) {
  return as_shape(as_type(gradient, ia3_l.scalar_type()), {ia3_l.sizes().begin(), ia3_l.sizes().end()});
}

}  // namespace peft_ext
