// The CPU operators of the rotary position embedding: checks, allocation and threads; rotary/kernels_impl.h has the
// kernel. All heads of a token are rotated by one thread.
#include <tuple>

#include "common/registration.h"
#include "cpu/isa.h"
#include "cpu/operator_call.h"
#include "cpu/threads.h"
#include "linear/cpu/packing.h"
#include "rotary/glue.h"
#include "rotary/kernels.h"

namespace peft_ext {

const RotaryKernels& rotary_kernels() {
#if defined(__x86_64__)
  return select_kernels(&kRotaryKernelsScalar, &kRotaryKernelsAvx2, &kRotaryKernelsAvx512);
#elif defined(__aarch64__)
  return select_kernels(&kRotaryKernelsScalar, &kRotaryKernelsNeon);
#else
  return kRotaryKernelsScalar;
#endif
}

namespace {

Heads heads_of(const Tensor& x, const Tensor& y) {
  return {x.const_data_ptr(), y.mutable_data_ptr(), x.size(1),   x.stride(0), x.stride(1),
          x.stride(2),        y.stride(0),          y.stride(1), y.stride(2)};
}

// Returns the rotated q and k. If `back`, q and k are the gradients of the rotated q and k, and the results are the
// gradients of the rotation's inputs.
std::tuple<Tensor, Tensor> rotated(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos,
                                   const Tensor& sin, bool back) {
  check_rotary(op, q, k, cos, sin);
  const Tensor y_q = like_with_whole_rows(q), y_k = like_with_whole_rows(k);
  const Tensor held_q = with_whole_rows(q), held_k = with_whole_rows(k);
  const Tensor held_cos = as_contiguous(cos), held_sin = as_contiguous(sin);
  Rotary work;
  work.dtype = dtype_of(op, "q", q);
  work.back = back;
  work.tokens = q.size(2);
  work.size = q.size(3);
  work.parts[0] = heads_of(held_q, y_q);
  work.parts[1] = heads_of(held_k, y_k);
  work.cos = held_cos.const_data_ptr();
  work.sin = held_sin.const_data_ptr();
  work.cos_batch = cos.size(0) == 1 ? 0 : work.tokens * work.size;
  const int64_t of_token = (q.size(1) + k.size(1)) * work.size;
  const RotaryKernels& isa = rotary_kernels();
  parallel_for(0, q.size(0) * work.tokens, ceil_div(kPackGrain, of_token + 1),
               [&](int64_t begin, int64_t end) { isa.rotate(work, begin, end); });
  return {y_q, y_k};
}

std::tuple<Tensor, Tensor> rotary_embedding_cpu(Tensor q, Tensor k, Tensor cos, Tensor sin) {
  return rotated("rotary_embedding", q, k, cos, sin, false);
}

std::tuple<Tensor, Tensor> rotary_embedding_backward_cpu(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin) {
  return rotated("rotary_embedding_backward", grad_q, grad_k, cos, sin, true);
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("rotary_embedding", PEFT_EXT_CPU_BOX(&peft_ext::rotary_embedding_cpu));
  m.impl("rotary_embedding_backward", PEFT_EXT_CPU_BOX(&peft_ext::rotary_embedding_backward_cpu));
}
