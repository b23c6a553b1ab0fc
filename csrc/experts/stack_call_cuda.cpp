// Checks, views and splits the weights and adapters of a mixture of experts. See experts/cuda/stack_call.cuh.
#include "experts/cuda/stack_call.cuh"

#include "linear/cuda/rank_plan.cuh"
#include "nf4/cuda/nf4_weight.cuh"
#include "packed/cuda/packed_weight.cuh"

namespace peft_ext {

DeviceStack checked_stack(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout,
                          const std::vector<int64_t>& shape, ScalarType type) {
  STD_TORCH_CHECK(on_device(weight), op, ": weight is not on a CUDA device");
  STD_TORCH_CHECK(shape.size() == 3, op, ": weight has ", shape.size(), " dimensions, wanted [E, N, K]");
  DeviceStack held;
  held.experts = shape[0];
  if (format_number(layout) != 0) {
    const DeviceWeight packed = packed_weights(op, weight, parts, layout, shape[0], shape[1], shape[2]);
    check_kernel_dtype(op, "x", type);
    held.all.weight = packed_dense_stack(packed, type, shape[0]);
    held.all.outputs = shape[1];
    held.all.inputs = shape[2];
    return held;
  }
  if (layout != 0 || parts[0].has_value()) {
    held.all = nf4_weights(op, weight, parts, layout, shape[0], shape[1], shape[2]);
    return held;
  }
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == shape[0] && weight.size(1) == shape[1] &&
                      weight.size(2) == shape[2] && weight.scalar_type() == type,
                  op, ": weight is ", torch::headeronly::toString(weight.scalar_type()), " with ", weight.numel(),
                  " elements, wanted ", torch::headeronly::toString(type), " [", shape[0], ", ", shape[1], ", ",
                  shape[2], "]");
  held.all.weight = weight;
  held.all.outputs = shape[1];
  held.all.inputs = shape[2];
  return held;
}

StackView stack_view(const Launcher& launcher, const DeviceStack& stack, bool transpose) {
  StackView view{};
  if (stack.all.is_nf4()) {
    view.nf4 = nf4_view(launcher, stack.all);
    view.codes = stack.all.codes();
    view.scales = stack.all.scales();
    view.groups = ceil_div(view.scales, kNestedBlock);
    view.by_column = transpose ? stack.all.inputs : 1;
    view.by_inner = transpose ? 1 : stack.all.inputs;
  } else {
    view.dense = launcher.in<void>(stack.all.weight);
    view.by_expert = stack.all.weight.stride(0);
    view.by_column = stack.all.weight.stride(transpose ? 1 : 2);
    view.by_inner = stack.all.weight.stride(transpose ? 2 : 1);
  }
  return view;
}

StackAdapters checked_adapters(const char* op, const DeviceStack& stack, const std::optional<Tensor>& lora_A,
                               const std::optional<Tensor>& lora_B, const std::optional<Tensor>& out_scale,
                               double scaling, double dropout_p, const std::optional<Tensor>& seed) {
  StackAdapters held;
  held.scale.scaling = scaling;
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), op, ": of lora_A and lora_B one is None");
  STD_TORCH_CHECK(!out_scale.has_value() || lora_A.has_value(), op, ": out_scale is given without lora_A");
  if (!lora_A.has_value()) return held;
  const Tensor &a = *lora_A, &b = *lora_B;
  check_matrix(op, "lora_A", a, stack.all.weight);
  check_matrix(op, "lora_B", b, stack.all.weight);
  STD_TORCH_CHECK(a.dim() == 3 && a.size(0) == stack.experts && a.size(1) > 0 && a.size(2) == stack.all.inputs, op,
                  ": lora_A has ", a.numel(), " elements, wanted [", stack.experts, ", R, ", stack.all.inputs, "]");
  STD_TORCH_CHECK(
      b.dim() == 3 && b.size(0) == stack.experts && b.size(1) == stack.all.outputs && b.size(2) == a.size(1), op,
      ": lora_B has ", b.numel(), " elements, wanted [", stack.experts, ", ", stack.all.outputs, ", ", a.size(1), "]");
  held.lora_A = a;
  held.lora_B = b;
  if (out_scale.has_value())
    held.out_scale = device_vector(op, "out_scale", *out_scale, stack.experts * stack.all.outputs, stack.all.weight);
  held.rank = a.size(1);
  held.padded = padded_rank(held.rank);
  held.scale.dropout_p = dropout_p;
  held.scale.seed = device_seed(op, dropout_p, seed, stack.all.weight);
  return held;
}

HeldTerms StackSplitter::right_of_pass(const Tensor& stack, bool transpose, int64_t padded, const Tensor* inner_scale) {
  const int64_t inner = stack.size(transpose ? 1 : 2);
  const bool one = type_ == ScalarType::BFloat16 && stack.scalar_type() == type_ && inner_scale == nullptr;
  return add(grouped_A_terms(like_, experts_, padded, inner, one), stack, transpose, inner_scale);
}

HeldTerms StackSplitter::right_of_product(const Tensor& stack, bool transpose, int64_t padded) {
  const int64_t outer = stack.size(transpose ? 2 : 1);
  return add(grouped_B_terms(like_, experts_, padded, outer, false, type_), stack, transpose);
}

HeldTerms StackSplitter::left_of_product(const Tensor& stack, int64_t padded) {
  return add(grouped_left_terms(like_, experts_, stack.size(1), padded, type_), stack, false);
}

void StackSplitter::run() const { launcher_(split_stacks_kernel, {blocks_, experts_, count_}, kSplitThreads, splits_); }

HeldTerms StackSplitter::add(const HeldTerms& held, const Tensor& stack, bool transpose, const Tensor* inner_scale) {
  StackSplit& work = splits_.work[count_++];
  work.in = launcher_.in<void>(stack);
  work.type = dtype_of(stack.scalar_type());
  work.outer = stack.size(transpose ? 2 : 1);
  work.inner = stack.size(transpose ? 1 : 2);
  work.by_expert = stack.stride(0);
  work.outer_stride = stack.stride(transpose ? 2 : 1);
  work.inner_stride = stack.stride(transpose ? 1 : 2);
  if (inner_scale != nullptr) work.inner_scale = launcher_.in<float>(*inner_scale);
  work.out = write_terms(launcher_, held);
  work.out_stride = terms_stride(held) * 4;
  blocks_ = std::max(blocks_, ceil_div(held.terms.outer * held.terms.inner / 2, kSplitThreads));
  return held;
}

}  // namespace peft_ext
