// A helper that the IA3 operators of the CPU and of CUDA share.
#pragma once

#include "common/tensor_calls.h"

namespace peft_ext {

// Returns the gradient of ia3_l in the shape and the dtype of ia3_l.
inline torch::stable::Tensor like(const torch::stable::Tensor& gradient, const torch::stable::Tensor& ia3_l) {
  return as_shape(as_type(gradient, ia3_l.scalar_type()), {ia3_l.sizes().begin(), ia3_l.sizes().end()});
}

}  // namespace peft_ext
