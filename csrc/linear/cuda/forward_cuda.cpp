// The forward of the adapted layer, whose formula is in adapted_linear.cuh. The steps:
//
//   S: a pass over x (rank_pass); Y₀ = S (ρB)ᵀ + b: one write of Y (expand); Y = Y₀ + x Wᵀ: PyTorch's matrix product
//
// A packed weight is decoded for the product, except in calls of few tokens that few_tokens_accept accepts: see
// few_tokens_cuda.cpp.
#include "linear/cuda/call.cuh"

namespace peft_ext {
std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x,
                                   int64_t outputs) {
  if (!bias.has_value()) return std::nullopt;
  STD_TORCH_CHECK(on_device(*bias) && bias->get_device_index() == x.get_device_index() &&
                      bias->scalar_type() == x.scalar_type() && bias->numel() == outputs,
                  op, ": bias is ", torch::headeronly::toString(bias->scalar_type()), " with ", bias->numel(),
                  " elements, wanted ", torch::headeronly::toString(x.scalar_type()), " with ", outputs,
                  " on x's device");
  return as_contiguous(*bias);
}

DeviceForward adapted_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceAdapter& adapter, bool bias_inside,
                              bool want_z) {
  const LinearSizes size = checked_sizes(op, x, weight, adapter);
  const ScalarType type = x.scalar_type();
  DeviceForward out;
  out.y = device_empty(x, shape_with_last(x, size.outputs), type);
  out.s = device_empty(
      x, adapter.lora_A.has_value() ? std::vector<int64_t>{size.tokens, size.rank} : std::vector<int64_t>{0},
      ScalarType::Float);
  out.z = device_empty(x, want_z ? std::vector<int64_t>{size.tokens, size.outputs} : std::vector<int64_t>{0}, type);
  if (size.tokens == 0) return out;
  STD_TORCH_CHECK(size.inputs > 0 && size.outputs > 0, op, ": weight is [", size.outputs, ", ", size.inputs,
                  "], wanted at least one output and one input");
  check_kernel_dtype(op, "x", type);
  const std::optional<Tensor> held_bias = checked_bias(op, bias, x, size.outputs);
  Tensor held = flat_rows(x);
  if (adapter.in_scale.has_value()) held = column_partials(held, adapter.in_scale, 0.0f, std::nullopt).scaled;
  const Tensor y = as_shape(out.y, {size.tokens, size.outputs});
  const bool low_rank = size.rank > 0, skinny = few_tokens_accept(weight, type, size.tokens, adapter);
  const bool drop_base = adapter.drop_base && adapter.seed.has_value();
  // If Z is not wanted and folds_scale returns true, the code computes Y = x (g ∘ W)ᵀ + S (g ∘ ρB)ᵀ + b₁, in which g
  // scales W instead of Z.
  const bool folds = adapter.out_scale.has_value() && !skinny && !want_z && !drop_base &&
                     !(bias_inside && held_bias.has_value()) && folds_scale(weight, type, size.tokens);

  HeldTerms s_terms, b_terms;
  if (low_rank && skinny && size.tokens <= kMaxShrinkTokens) {
    shrink_few(held, adapter, size, out.s);
  } else if (low_rank) {
    const Tensor a = matrix(adapter.lora_A), b = matrix(adapter.lora_B);
    Splitter splitter(x, type);
    const HeldTerms a_terms = splitter.right_of_pass(a, false);
    if (!skinny) {
      s_terms = left_terms(x, size.tokens, size.padded, type);
      b_terms = splitter.right_of_expand(b, false, folds ? &*adapter.out_scale : nullptr);
    }
    splitter.run();
    shrink(held, adapter, size, a_terms, out.s, skinny ? nullptr : &s_terms);
  }
  if (skinny) {
    few_tokens_forward(held, weight, held_bias, adapter, size, bias_inside, out, y, want_z);
    return out;
  }

  const Tensor product =
      transposed(folds ? scaled_weight(weight, type, *adapter.out_scale) : dense_weight(weight, type));
  if (!adapter.out_scale.has_value() || folds) {
    if (low_rank || held_bias.has_value()) {
      expand(y, low_rank ? &s_terms : nullptr, &b_terms, nullptr, held_bias);
      addmm_(y, held, product, 1.0);
    } else {
      mm_out(y, held, product);
    }
    if (want_z) {  // without out_scale, Y = Z + b₀
      Tensor z = out.z;
      torch::stable::copy_(z, y);
    }
    return out;
  }
  const std::optional<Tensor> before = bias_inside ? held_bias : std::nullopt;
  const std::optional<Tensor> after = bias_inside ? std::nullopt : held_bias;
  const Tensor z = want_z ? out.z : drop_base ? device_empty_like(y) : y;
  const Tensor x_of_z = drop_base ? dropped(held, adapter, std::nullopt) : held;
  // If Z + b₀ is wanted, b₀ is written first, and the product is added to b₀.
  const bool bias_first = want_z && before.has_value();
  if (low_rank || bias_first) {
    expand(z, low_rank ? &s_terms : nullptr, &b_terms, nullptr, bias_first ? before : std::nullopt);
    addmm_(z, x_of_z, product, 1.0);
  } else {
    mm_out(z, x_of_z, product);
  }
  if (drop_base) {
    mm_out(y, held, product);
    expand(y, low_rank ? &s_terms : nullptr, &b_terms, &y, after, Scaled{z, *adapter.out_scale});
    return out;
  }
  finish(y, z, *adapter.out_scale, bias_first ? std::nullopt : before, after);
  return out;
}

}  // namespace peft_ext
