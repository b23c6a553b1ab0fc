// The forward: see adapted_linear.cuh for the formula. What runs, with bytes in units of the activations:
//
//   S: one pass over x (rank_pass); Y₀ = S (ρB)ᵀ + b: one write (expand); Y₀ += x Wᵀ: PyTorch's product
//
// An NF4 weight is dequantized for the product; up to kSkinnyTokens tokens of 16-bit types take nf4_skinny_kernel,
// whose second kernel adds all the rest.
#include "linear/cuda/call.cuh"
#include "linear/cuda/select_ranks.cuh"
#include "linear/cuda/shrink_few.cuh"
#include "nf4/cuda/nf4_skinny.cuh"

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

// The same S, for few tokens.
constexpr int64_t kMaxShrinkTokens = 16;

void shrink_few(const Tensor& x, const DeviceAdapter& adapter, const LinearSizes& size, const Tensor& s) {
  const Tensor a = matrix(adapter.lora_A);
  Launcher launcher(x);
  ShrinkFew work{};
  work.x = launcher.in<void>(x);
  work.lora_A = launcher.in<void>(a);
  work.type = dtype_of(a.scalar_type());
  work.tokens = size.tokens;
  work.inputs = size.inputs;
  work.rank = size.rank;
  work.whole = whole_columns(x, size.inputs);
  work.whole_A = whole_columns(a, size.inputs);
  work.dropout = device_dropout(launcher, adapter);
  work.s = launcher.scratch<float>(s);
  with_type(x.scalar_type(), [&](auto zero) {
    launcher(shrink_few_kernel<decltype(zero)>, {size.rank, ceil_div(size.tokens, kShrinkTokens)}, kShrinkThreads,
             work);
  });
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

// --- few tokens against NF4

bool skinny_accepts(const DeviceWeight& weight, ScalarType type, int64_t tokens, const DeviceAdapter& adapter) {
  return weight.is_nf4() && type != ScalarType::Float && tokens <= kSkinnyTokens && weight.inputs % 32 == 0 &&
         !(adapter.drop_base && adapter.seed.has_value());
}

template <typename T>
void launch_skinny(const Launcher& launcher, const Skinny& work, const Grid& grid) {
  if (work.tokens <= 8) {
    launcher(nf4_skinny_kernel<T, 1>, grid, kSkinnyThreads, work);
  } else if (work.tokens <= 16) {
    launcher(nf4_skinny_kernel<T, 2>, grid, kSkinnyThreads, work);
  } else if (work.tokens <= 32) {
    launcher(nf4_skinny_kernel<T, 4>, grid, kSkinnyThreads, work);
  } else {
    launcher(nf4_skinny_kernel<T, 8>, grid, kSkinnyThreads, work);
  }
}

void skinny_forward(const Tensor& x, const DeviceWeight& weight, const std::optional<Tensor>& bias,
                    const DeviceAdapter& adapter, const LinearSizes& size, bool bias_inside, const DeviceForward& out,
                    const Tensor& y, bool want_z) {
  Launcher launcher(x);
  const Tensor held = aligned(x, 16) ? x : torch::stable::clone(x);
  Skinny work{};
  work.x = launcher.in<void>(held);
  work.weight = nf4_view(launcher, weight);
  work.outputs = size.outputs;
  work.inputs = size.inputs;
  work.tokens = static_cast<int>(size.tokens);
  // K is split until the device is full, but not into less than four slabs, the pipeline's depth; less often for more
  // tokens, whose partial sums are larger.
  const int64_t row_blocks = ceil_div(size.outputs, kSkinnyRows), slabs = ceil_div(size.inputs, kSkinnySlab);
  const int64_t per_multiprocessor = size.tokens <= 16 ? 4 : 2;
  const int64_t wanted =
      std::min(ceil_div(per_multiprocessor * launcher.multiprocessors(), row_blocks), ceil_div(slabs, 4));
  work.slabs_per_chunk = ceil_div(slabs, wanted);
  const int64_t chunks = ceil_div(slabs, work.slabs_per_chunk);
  work.padded_outputs = row_blocks * kSkinnyRows;
  const Tensor partial = device_empty(x, {chunks, size.tokens, work.padded_outputs}, ScalarType::Float);
  work.partial = launcher.scratch<float>(partial);

  SkinnyFinish end{};
  end.partial = work.partial;
  end.chunks = chunks;
  end.padded_outputs = work.padded_outputs;
  end.tokens = work.tokens;
  end.outputs = size.outputs;
  end.rank = size.rank;
  end.scaling = static_cast<float>(adapter.scaling);
  Tensor b;
  if (size.rank > 0) {
    b = as_type(matrix(adapter.lora_B), ScalarType::Float);
    end.s = launcher.in<float>(out.s);
    end.lora_B = launcher.in<float>(b);
    end.rank_scale = launcher.in<float>(adapter.rank_scale);
  }
  end.scale = launcher.in<float>(adapter.out_scale);
  end.bias_before = bias_inside ? launcher.in<void>(bias) : nullptr;
  end.bias_after = bias_inside ? nullptr : launcher.in<void>(bias);
  end.y = launcher.scratch<void>(y);
  end.z = want_z ? launcher.scratch<void>(out.z) : nullptr;
  const Grid grid(row_blocks, chunks);
  const Grid finish_grid(ceil_div(size.outputs, kSkinnyThreads), ceil_div(size.tokens, kFinishTokens));
  if (x.scalar_type() == ScalarType::BFloat16) {
    launch_skinny<bf16>(launcher, work, grid);
    launcher(skinny_finish_kernel<bf16>, finish_grid, kSkinnyThreads, end);
  } else {
    launch_skinny<f16>(launcher, work, grid);
    launcher(skinny_finish_kernel<f16>, finish_grid, kSkinnyThreads, end);
  }
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
  const bool low_rank = size.rank > 0, skinny = skinny_accepts(weight, type, size.tokens, adapter);

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
      b_terms = splitter.right_of_expand(b, false);
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
    skinny_forward(held, weight, held_bias, adapter, size, bias_inside, out, y, want_z);
    if (groups != nullptr) out.s = kept;
    return out;
  }

  if (groups != nullptr) out.s = kept;

  const Tensor product = transposed(dense_weight(weight, type));
  if (!adapter.out_scale.has_value()) {
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
  const bool drop_base = adapter.drop_base && adapter.seed.has_value();
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
