// A helper that the IA3 operators of the CPU and of CUDA share.
#pragma once

#include "common/tensor_calls.h"

namespace peft_ext {

// Returns the gradient of ia3_l in ia3_l's shape, [N], [N, 1] or [1, N], and in ia3_l's dtype.
inline torch::stable::Tensor like(const torch::stable::Tensor& gradient, const torch::stable::Tensor& ia3_l) {
  return as_shape(as_type(gradient, ia3_l.scalar_type()), {ia3_l.sizes().begin(), ia3_l.sizes().end()});
}

}  // namespace peft_ext
