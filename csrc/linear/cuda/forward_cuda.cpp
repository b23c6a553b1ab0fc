// Computes the forward of the adapted layer, whose formula is in adapted_linear.cuh. Without an output scale, the steps
// are:
//
//   One pass over x computes S (rank_pass).
//   One write of Y computes Y₀ = S (ρB)ᵀ + b (expand).
//   PyTorch's matrix product adds x Wᵀ in place, which gives Y = Y₀ + x Wᵀ.
//
// A packed weight is decoded before PyTorch's product, except in calls that few_tokens_accept accepts: for these calls,
// the kernels of few_tokens_cuda.cpp decode the weight during the product.
#include "linear/cuda/call.cuh"

namespace peft_ext {
std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x,
                                   int64_t outputs) {
  if (!bias.has_value()) return std::nullopt;
  STD_TORCH_CHECK(same_device(*bias, x) && bias->scalar_type() == x.scalar_type() && bias->numel() == outputs, op,
                  ": bias is ", torch::headeronly::toString(bias->scalar_type()), " with ", bias->numel(),
                  " elements, wanted ", torch::headeronly::toString(x.scalar_type()), " with ", outputs,
                  " on x's device");
  return as_contiguous(*bias);
}

DeviceForward adapted_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceAdapter& adapter, bool bias_inside,
                              bool want_z, const DeviceShrunk* shrunk) {
  const DeviceSizes size = checked_sizes(op, x, weight, adapter);
  const ScalarType type = x.scalar_type();
  DeviceForward out;
  out.y = device_empty(x, shape_with_last(x, size.outputs), type);
  out.s = shrunk != nullptr            ? shrunk->s
          : adapter.lora_A.has_value() ? device_empty(x, {size.tokens, size.rank}, ScalarType::Float)
                                       : device_empty(x, {0}, ScalarType::Float);
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
  // If `folds` is true, the code computes Y = x (g ∘ W)ᵀ + S (g ∘ ρB)ᵀ + b₁: the output scale g multiplies W and ρB
  // instead of Z = x Wᵀ + S (ρB)ᵀ.
  const bool folds = adapter.out_scale.has_value() && !skinny && !want_z && !drop_base &&
                     !(bias_inside && held_bias.has_value()) && folds_scale(weight, type, size.tokens);

  HeldTerms s_terms, b_terms;
  if (shrunk != nullptr) {
    s_terms = shrunk->s_terms, b_terms = shrunk->b_terms;
  } else if (low_rank && skinny && size.tokens <= kMaxShrinkTokens) {
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
    if (want_z) {  // without out_scale, z (the output before scaling) equals y
      Tensor z = out.z;
      torch::stable::copy_(z, y);
    }
    return out;
  }
  const std::optional<Tensor> before = bias_inside ? held_bias : std::nullopt;
  const std::optional<Tensor> after = bias_inside ? std::nullopt : held_bias;
  const Tensor z = want_z ? out.z : drop_base ? device_empty_like(y) : y;
  const Tensor x_of_z = drop_base ? dropped(held, adapter, std::nullopt) : held;
  // If the caller wants Z + b₀ (the output before scaling), expand writes b₀ first, and PyTorch's product is added to
  // b₀.
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

std::vector<DeviceForward> adapted_forwards(const char* op, const Tensor& x, const std::vector<DeviceLayer>& layers) {
  // The sizes of all layers are checked before any launch, so that a call with wrong sizes launches nothing.
  std::vector<DeviceSizes> sizes;
  for (const DeviceLayer& layer : layers) sizes.push_back(checked_sizes(op, x, layer.weight, layer.adapter));
  check_kernel_dtype(op, "x", x.scalar_type());
  const ScalarType type = x.scalar_type();
  std::vector<std::optional<DeviceShrunk>> shrunk(layers.size());
  const Tensor held = flat_rows(x);
  if (held.numel() > 0 && siblings_read(held)) {
    std::vector<int64_t> kinds;
    for (size_t i = 0; i < layers.size(); ++i) {
      const DeviceLayer& layer = layers[i];
      const bool alone = sizes[i].rank == 0 || layer.weight.outputs == 0 ||
                         few_tokens_accept(layer.weight, type, sizes[i].tokens, layer.adapter);
      // One rank pass over x for several layers needs factors with equally many bfloat16 terms. Therefore layers whose
      // lora_A has one term and layers whose lora_A has more terms have different numbers in `kinds`.
      const int64_t one = !alone && type == ScalarType::BFloat16 && layer.adapter.lora_A->scalar_type() == type;
      kinds.push_back(alone ? -1 : sizes[i].padded | one << 32);
    }
    std::vector<HeldTerms> a_terms(layers.size());
    std::vector<Tensor> matrices;
    Splitter splitter(x, type);
    const std::vector<std::vector<size_t>> groups = sibling_groups(kinds);
    for (const std::vector<size_t>& group : groups) {
      if (group.size() < 2) continue;
      for (size_t i : group) {
        const Tensor a = matrix(layers[i].adapter.lora_A), b = matrix(layers[i].adapter.lora_B);
        matrices.push_back(a), matrices.push_back(b);
        a_terms[i] = splitter.right_of_pass(a, false);
        shrunk[i] =
            DeviceShrunk{device_empty(x, {sizes[i].tokens, sizes[i].rank}, ScalarType::Float),
                         left_terms(x, sizes[i].tokens, sizes[i].padded, type), splitter.right_of_expand(b, false)};
      }
    }
    splitter.run();
    std::vector<SiblingSums> sums;  // reducer.run() reads the tensors in `sums`
    Reducer reducer(x);
    for (const std::vector<size_t>& group : groups) {
      if (group.size() < 2) continue;
      std::vector<SiblingTerm> terms;
      for (size_t i : group) terms.push_back({&a_terms[i], &layers[i].adapter});
      sums.push_back(siblings_pass(held, terms, false, false));
      for (size_t j = 0; j < group.size(); ++j) {
        const size_t i = group[j];
        reducer.add(sums.back().sums[j], sizes[i].rank,
                    shrunk_results(layers[i].adapter, shrunk[i]->s, &shrunk[i]->s_terms));
      }
    }
    reducer.run();
  }
  std::vector<DeviceForward> out;
  for (size_t i = 0; i < layers.size(); ++i)
    out.push_back(adapted_forward(op, x, layers[i].weight, layers[i].bias, layers[i].adapter, false, false,
                                  shrunk[i].has_value() ? &*shrunk[i] : nullptr));
  return out;
}

}  // namespace peft_ext
