// Dropout alone on the CPU: y = mask ∘ x / (1 - p), which is its own backward. An element's draw depends on its place
// alone: the same bits for any number of threads.
#include "linear/cpu/adapted_linear.h"

namespace peft_ext {
namespace {

Tensor dropout_cpu(Tensor x, double dropout_p, Tensor seed) {
  constexpr const char* kOp = "dropout";
  const Tensor held = as_contiguous(x);
  Tensor y = empty({x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  DropElements work;
  work.m = held.const_data_ptr();
  work.dtype = dtype_of(kOp, "x", held);
  work.dropout = make_dropout(kOp, dropout_p, seed);
  work.out = y.mutable_data_ptr();
  const int64_t count = held.numel(), groups = ceil_div(count, kDropTogether);
  const PassKernels& isa = pass_kernels();
  torch::stable::parallel_for(0, groups, ceil_div(kPackGrain, kDropTogether), [&](int64_t begin, int64_t end) {
    isa.drop_elements(work, begin * kDropTogether, min_i64(end * kDropTogether, count));
  });
  return y;
}

}  // namespace
}  // namespace peft_ext

STABLE_TORCH_LIBRARY_IMPL(peft_ext, CPU, m) { m.impl("dropout", TORCH_BOX(&peft_ext::dropout_cpu)); }
