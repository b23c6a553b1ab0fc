// The CUDA operator cross_entropy_rows: the cross entropy of each row of logits. If needs_grad, the operator overwrites
// the logits with the gradient. See cross_entropy.cuh.
#include "cross_entropy/cross_entropy.cuh"

#include "cuda/tensor.cuh"

namespace peft_ext {
namespace {

Tensor cross_entropy_rows_cuda(Tensor logits, const Tensor& labels, const std::optional<Tensor>& row_weight,
                               double scale, double softcap, double smoothing, int64_t ignore_index, bool needs_grad) {
  constexpr const char* kOp = "cross_entropy_rows";
  STD_TORCH_CHECK(on_device(logits), kOp, ": logits is not on a CUDA device");
  check_kernel_dtype(kOp, "logits", logits.scalar_type());
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0, kOp,
                  ": logits is not [T, V] with at least one column, contiguous");
  const int64_t tokens = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(same_device(labels, logits) && labels.scalar_type() == ScalarType::Long && labels.numel() == tokens &&
                      labels.is_contiguous(),
                  kOp, ": labels is not Long [", tokens, "], contiguous, on logits' device");
  STD_TORCH_CHECK(
      !row_weight.has_value() || (same_device(*row_weight, logits) && row_weight->scalar_type() == ScalarType::Float &&
                                  row_weight->numel() == tokens && row_weight->is_contiguous()),
      kOp, ": row_weight is not Float [", tokens, "], contiguous, on logits' device");
  Tensor losses = device_empty(logits, {tokens}, ScalarType::Float);
  const Launcher launcher(logits);
  CrossEntropyWork work;
  work.logits = launcher.out<void>(logits);
  work.labels = launcher.in<int64_t>(labels);
  work.row_weight = launcher.in<float>(row_weight);
  work.losses = launcher.out<float>(losses);
  work.columns = columns;
  work.ignored = ignore_index;
  work.scale = static_cast<float>(scale);
  work.softcap = static_cast<float>(softcap);
  work.smoothing = static_cast<float>(smoothing);
  work.needs_grad = needs_grad;
  work.whole = whole_columns(logits, columns);
  with_type(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (columns * static_cast<int64_t>(logits.element_size()) <= kShortRow)
      return launcher(softcap > 0.0 ? cross_entropy_kernel<T, true, kCrossEntropyThreads>
                                    : cross_entropy_kernel<T, false, kCrossEntropyThreads>,
                      tokens, kCrossEntropyThreads, work);
    launcher(softcap > 0.0 ? cross_entropy_kernel<T, true, kLongRowThreads>
                           : cross_entropy_kernel<T, false, kLongRowThreads>,
             tokens, Block(kLongRowThreads, kHeldBytes), work);
  });
  return losses;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) { m.impl("cross_entropy_rows", PEFT_EXT_CUDA_BOX(&peft_ext::cross_entropy_rows_cuda)); }
