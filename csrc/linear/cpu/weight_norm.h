// Computes DoRA's norm n of each row of W + s B A, where s is the LoRA scaling, and the gradients of A and B through
// the norm, without forming the matrix W + s B A.
//
//   One pass over W computes U = W Aᵀ and n² = ‖W‖² + 2 rowsum(U ∘ sB) + rowsum(sB (A Aᵀ) ∘ sB).
//   The gradients are dB = c (s U + s² B A Aᵀ) and dA = s (cB)ᵀ W + s² (cB)ᵀ B A, where c = dn / n, or 0 where n = 0.
//   dA needs one more pass over W.
#pragma once

#include "weight/frozen_weight.h"

namespace peft_ext {

struct WeightNorm {
  Tensor norm, u;  // norm is n [N], u is U [N, R]; both are float32
};

// type: dtype to which a packed weight is decoded.
WeightNorm weight_norm(const char* op, const FrozenWeight& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling, ScalarType type);

struct WeightNormGradient {
  Tensor grad_A, grad_B;  // gradients of lora_A and lora_B, in their dtypes
};

WeightNormGradient weight_norm_backward(const char* op, const Tensor& grad, const FrozenWeight& weight,
                                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm, const Tensor& u,
                                        double scaling, ScalarType type);

}  // namespace peft_ext
