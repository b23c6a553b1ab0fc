// A check of shapes that the rotary operators of the CPU and of CUDA share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace peft_ext {

// Raises an error unless q is [B, H, T, D], k is [B, Hkv, T, D], and cos and sin are [B or 1, T, D], with an even D and
// one dtype.
inline void check_rotary(const char* op, const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                         const torch::stable::Tensor& cos, const torch::stable::Tensor& sin) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.size(0) == q.size(0) && k.size(2) == q.size(2) &&
                      k.size(3) == q.size(3) && q.size(3) % 2 == 0,
                  op, ": q and k are not [B, H, T, D] and [B, Hkv, T, D] with an even D");
  for (const torch::stable::Tensor* of : {&cos, &sin})
    STD_TORCH_CHECK(of->dim() == 3 && (of->size(0) == 1 || of->size(0) == q.size(0)) && of->size(1) == q.size(2) &&
                        of->size(2) == q.size(3) && of->size(0) == cos.size(0),
                    op, ": cos and sin are not [B, T, D] or [1, T, D]");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && cos.scalar_type() == q.scalar_type() &&
                      sin.scalar_type() == q.scalar_type(),
                  op, ": k, cos or sin is not of q's type");
}

}  // namespace peft_ext
