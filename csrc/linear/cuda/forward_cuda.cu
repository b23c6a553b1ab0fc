// The forward: see adapted_linear.cuh for the formula. What runs, with bytes in units of the activations:
//
//   S: one pass over x (rank_pass); Y₀ = S (ρB)ᵀ + b: one write (expand); Y₀ += x Wᵀ: PyTorch's product
//
// An NF4 weight is dequantized for the product, but for few tokens of 16-bit types: see few_tokens_cuda.cu.
#include "linear/cuda/call.cuh"
#include "linear/cuda/select_ranks.cuh"

namespace peft_ext {
namespace {

// A bias as kernels take it.
std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x,
                                   int64_t outputs) {
  if (!bias.has_value()) return std::nullopt;
  STD_TORCH_CHECK(on_device(*bias) && bias->get_device_index() == x.get_device_index() &&
                      bias->scalar_type() == x.scalar_type() && bias->numel() == outputs,
                  op, ": bias is ", torch::headeronly::toString(bias->scalar_type()), " with ", bias->numel(),
                  " elements, wanted ", torch::headeronly::toString(x.scalar_type()), " with ", outputs,
                  " on x's device");
  return torch::stable::contiguous(*bias);
}

// Of S [T, R], each token's own adapter's ranks, scaled; and those alone, as they were: [T, the largest rank].
Tensor select_ranks(const DeviceGroups& groups, const Tensor& s) {
  const int64_t tokens = s.size(0), rank = s.size(1), samples = static_cast<int64_t>(groups.adapters.size());
  std::vector<RankRange> of_adapter;
  int64_t first = 0;
  for (size_t g = 0; g < groups.ranks.size(); ++g) {
    of_adapter.push_back({static_cast<int32_t>(first), static_cast<int32_t>(groups.ranks[g]), groups.scaling[g]});
    first += groups.ranks[g];
  }
  // The kernel's threads reach the columns that S has.
  const Tensor kept = groups.rank > rank ? device_zeros(s, {tokens, groups.rank}, ScalarType::Float)
                                         : device_empty(s, {tokens, groups.rank}, ScalarType::Float);
  Launcher launcher(s);
  SelectRanks work{};
  work.s = launcher.out<float>(s);
  work.kept = launcher.out<float>(kept);
  work.length = tokens / samples;
  work.rank = rank;
  work.kept_rank = groups.rank;
  for (int64_t from = 0; from < samples; from += kSelectSamples) {
    const int64_t count = std::min<int64_t>(kSelectSamples, samples - from);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t group = groups.adapters[static_cast<size_t>(from + i)];
      work.ranges[i] = group < 0 ? RankRange{} : of_adapter[static_cast<size_t>(group)];
    }
    work.begin = from * work.length;
    work.tokens = count * work.length;
    launcher(select_ranks_kernel, ceil_div(work.tokens * rank, kSelectThreads), kSelectThreads, work);
  }
  return kept;
}

}  // namespace

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
  if (size.tokens == 0) {
    if (adapter.groups != nullptr) out.s = device_empty(x, {0, adapter.groups->rank}, ScalarType::Float);
    return out;
  }
  STD_TORCH_CHECK(size.inputs > 0 && size.outputs > 0, op, ": weight is [", size.outputs, ", ", size.inputs,
                  "], wanted at least one output and one input");
  check_kernel_dtype(op, "x", type);
  const std::optional<Tensor> held_bias = checked_bias(op, bias, x, size.outputs);
  Tensor held = flat_rows(x);
  if (adapter.in_scale.has_value()) held = column_partials(held, adapter.in_scale, 0.0f, std::nullopt).scaled;
  const Tensor y = torch::stable::view(out.y, {size.tokens, size.outputs});
  const bool low_rank = size.rank > 0, skinny = few_tokens_accept(weight, type, size.tokens, adapter);
  const bool drop_base = adapter.drop_base && adapter.seed.has_value();
  // Where nobody wants Z, and g costs less in W: Y = x (g ∘ W)ᵀ + S (g ∘ ρB)ᵀ + b₁.
  const bool folds = adapter.out_scale.has_value() && !skinny && !want_z && !drop_base &&
                     !(bias_inside && held_bias.has_value()) && folds_scale(weight, type, size.tokens);

  HeldTerms s_terms, b_terms;
  const DeviceGroups* groups = adapter.groups;
  if (low_rank && skinny && size.tokens <= kMaxShrinkTokens) {
    shrink_few(held, adapter, size, out.s);
  } else if (low_rank) {
    const Tensor a = matrix(adapter.lora_A), b = matrix(adapter.lora_B);
    Splitter splitter(x, type);
    const HeldTerms a_terms = splitter.right_of_pass(a, false);
    if (!skinny) {
      if (groups == nullptr) s_terms = left_terms(x, size.tokens, size.padded, type);
      b_terms = splitter.right_of_expand(b, false, folds ? &*adapter.out_scale : nullptr);
    }
    splitter.run();
    shrink(held, adapter, size, a_terms, out.s, skinny || groups != nullptr ? nullptr : &s_terms);
  }
  Tensor kept;
  if (groups != nullptr) {
    kept = select_ranks(*groups, out.s);
    if (!skinny) {
      Splitter splitter(x, type);
      s_terms = splitter.left_of_expand(out.s, false);
      splitter.run();
    }
  }
  if (skinny) {
    few_tokens_forward(held, weight, held_bias, adapter, size, bias_inside, out, y, want_z);
    if (groups != nullptr) out.s = kept;
    return out;
  }

  if (groups != nullptr) out.s = kept;

  const Tensor product =
      transposed(folds ? scaled_weight(weight, type, *adapter.out_scale) : dense_weight(weight, type));
  if (!adapter.out_scale.has_value() || folds) {
    if (low_rank || held_bias.has_value()) {
      expand(y, low_rank ? &s_terms : nullptr, &b_terms, nullptr, held_bias);
      addmm_(y, held, product, 1.0);
    } else {
      mm_out(y, held, product);
    }
    if (want_z) {  // which is Y where nothing scales it
      Tensor z = out.z;
      torch::stable::copy_(z, y);
    }
    return out;
  }
  const std::optional<Tensor> before = bias_inside ? held_bias : std::nullopt;
  const std::optional<Tensor> after = bias_inside ? std::nullopt : held_bias;
  const Tensor z = want_z ? out.z : drop_base ? torch::stable::empty_like(y) : y;
  const Tensor x_of_z = drop_base ? dropped(held, adapter, std::nullopt) : held;
  // Where Z + b₀ is kept the product finds b₀ there.
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
