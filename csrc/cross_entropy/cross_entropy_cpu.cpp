// The CPU operator cross_entropy_rows: the cross entropy of each row of logits. If needs_grad, the operator overwrites
// the logits with the gradient. See cross_entropy.h.
#include "common/registration.h"
#include "cpu/operator_call.h"
#include "cross_entropy/cross_entropy.h"

#include "cpu/isa.h"
#include "cpu/tensor.h"
#include "cpu/threads.h"

namespace peft_ext {
namespace {

constexpr int64_t kElementGrain = 32 * 1024;

Tensor cross_entropy_rows_cpu(Tensor logits, const Tensor& labels, const std::optional<Tensor>& row_weight,
                              double scale, double softcap, double smoothing, int64_t ignore_index, bool needs_grad) {
  constexpr const char* kOp = "cross_entropy_rows";
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0, kOp,
                  ": logits is not [T, V] with at least one column, contiguous");
  const int64_t tokens = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.numel() == tokens && labels.is_contiguous(), kOp,
                  ": labels is not Long [", tokens, "], contiguous");
  STD_TORCH_CHECK(!row_weight.has_value() || (row_weight->scalar_type() == ScalarType::Float &&
                                              row_weight->numel() == tokens && row_weight->is_contiguous()),
                  kOp, ": row_weight is not Float [", tokens, "], contiguous");
  CrossEntropy work;
  work.logits = logits.mutable_data_ptr();
  work.dtype = dtype_of(kOp, "logits", logits);
  work.columns = columns;
  work.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t t = 0; t < tokens; ++t)
    STD_TORCH_CHECK(work.labels[t] == ignore_index || (work.labels[t] >= 0 && work.labels[t] < columns), kOp,
                    ": labels has ", work.labels[t], ", wanted 0 to ", columns - 1, " or ", ignore_index);
  Tensor losses = empty({tokens}, ScalarType::Float);
  work.row_weight = row_weight.has_value() ? row_weight->const_data_ptr<float>() : nullptr;
  work.losses = losses.mutable_data_ptr<float>();
  work.scale = static_cast<float>(scale);
  work.softcap = static_cast<float>(softcap);
  work.smoothing = static_cast<float>(smoothing);
  work.ignored = ignore_index;
  work.needs_grad = needs_grad;
#if defined(__x86_64__)
  const CrossEntropyKernels& kernels = select_kernels(&kCrossEntropyScalar, &kCrossEntropyAvx2, &kCrossEntropyAvx512);
#elif defined(__aarch64__)
  const CrossEntropyKernels& kernels = select_kernels(&kCrossEntropyScalar, &kCrossEntropyNeon);
#else
  const CrossEntropyKernels& kernels = kCrossEntropyScalar;
#endif
  parallel_for(0, tokens, ceil_div(kElementGrain, columns),
               [&](int64_t begin, int64_t end) { kernels.rows(work, begin, end); });
  return losses;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) { m.impl("cross_entropy_rows", PEFT_EXT_CPU_BOX(&peft_ext::cross_entropy_rows_cpu)); }
