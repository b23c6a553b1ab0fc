// The CUDA operators of the rotary position embedding: one launch of rotary_kernel (rotary.cuh) for q and k.
#include "rotary/rotary.cuh"

#include <tuple>

#include "cuda/tensor.cuh"
#include "rotary/glue.h"

namespace peft_ext {
namespace {

DeviceHeads heads_of(const Launcher& launcher, const Tensor& x, const Tensor& y) {
  DeviceHeads heads;
  heads.x = launcher.in<void>(x);
  heads.y = launcher.out<void>(y);
  heads.heads = static_cast<int>(x.size(1));
  heads.x_batch = x.stride(0), heads.x_head = x.stride(1), heads.x_token = x.stride(2);
  heads.y_batch = y.stride(0), heads.y_head = y.stride(1), heads.y_token = y.stride(2);
  return heads;
}

// Returns whether x is aligned to 16 bytes and all its strides between heads, tokens and batches are multiples of eight
// elements, so that every head is aligned to 16 bytes. The stride of a dimension of size 1 may have any value.
bool whole_heads(const Tensor& x) {
  bool whole = aligned(x, 16);
  for (int64_t d = 0; d < 3; ++d) whole = whole && (x.size(d) == 1 || x.stride(d) % kVector == 0);
  return whole;
}

std::tuple<Tensor, Tensor> rotated(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos,
                                   const Tensor& sin, bool back) {
  check_matrix(op, "q", q, q);
  check_matrix(op, "k", k, q);
  check_matrix(op, "cos", cos, q);
  check_matrix(op, "sin", sin, q);
  check_rotary(op, q, k, cos, sin);
  const Tensor y_q = like_with_whole_rows(q), y_k = like_with_whole_rows(k);
  const int64_t half = q.size(3) / 2, rows = q.size(0) * q.size(2);
  if (rows == 0 || half == 0) return {y_q, y_k};
  const Tensor held_q = with_whole_rows(q), held_k = with_whole_rows(k);
  const Tensor held_cos = as_contiguous(cos), held_sin = as_contiguous(sin);
  Launcher launcher(q);
  DeviceRotary work;
  work.q = heads_of(launcher, held_q, y_q);
  work.k = heads_of(launcher, held_k, y_k);
  work.cos = launcher.in<void>(held_cos);
  work.sin = launcher.in<void>(held_sin);
  work.tokens = q.size(2);
  work.cos_batch = cos.size(0) == 1 ? 0 : work.tokens * 2 * half;
  work.half = static_cast<int>(half);
  work.whole = half % kVector == 0 && whole_heads(held_q) && whole_heads(held_k) && whole_heads(y_q) &&
               whole_heads(y_k) && aligned(held_cos, 16) && aligned(held_sin, 16);
  with_type(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launcher(back ? rotary_kernel<T, true> : rotary_kernel<T, false>, rows, kRotaryThreads, work);
  });
  return {y_q, y_k};
}

std::tuple<Tensor, Tensor> rotary_embedding_cuda(const Tensor& q, const Tensor& k, const Tensor& cos,
                                                 const Tensor& sin) {
  return rotated("rotary_embedding", q, k, cos, sin, false);
}

std::tuple<Tensor, Tensor> rotary_embedding_backward_cuda(const Tensor& grad_q, const Tensor& grad_k, const Tensor& cos,
                                                          const Tensor& sin) {
  return rotated("rotary_embedding_backward", grad_q, grad_k, cos, sin, true);
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("rotary_embedding", PEFT_EXT_CUDA_BOX(&peft_ext::rotary_embedding_cuda));
  m.impl("rotary_embedding_backward", PEFT_EXT_CUDA_BOX(&peft_ext::rotary_embedding_backward_cuda));
}
