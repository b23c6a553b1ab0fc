// See linear/adapted_cuda.h. What runs, with bytes in units of the activations:
//
//   forward    S: one pass over x (rank_pass); Y₀ = S (ρB)ᵀ + b: one write (expand); Y₀ += x Wᵀ: PyTorch's product
//   backward   P = dY (ρB) and dB = dYᵀ S: one pass over dY; dA = x̃ᵀ P: one pass over x; dX₀ = mask ∘ (P A): one
//              write; dX₀ += G W: PyTorch's product
//
// An NF4 weight is dequantized for the product; up to kSkinnyTokens tokens of 16-bit types take nf4_skinny_kernel,
// whose second kernel adds all the rest.
#include "linear/adapted_cuda.h"

#include <math.h>

#include "dora/dora_norm.cuh"
#include "linear/expand.cuh"
#include "linear/passes_cuda.h"
#include "linear/rank_scale.cuh"
#include "linear/select_ranks.cuh"
#include "linear/shrink_few.cuh"
#include "nf4/nf4_skinny.cuh"

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

// --- the low-rank term

struct Sizes {
  int64_t tokens, inputs, outputs, rank, padded;
};

Sizes checked_sizes(const char* op, const Tensor& x, const DeviceWeight& weight, const DeviceAdapter& adapter) {
  STD_TORCH_CHECK(on_device(x) && x.get_device_index() == weight.weight.get_device_index(), op,
                  ": x is on another device than weight, wanted cuda:", weight.weight.get_device_index());
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.inputs, op, ": x has ",
                  x.dim() >= 1 ? x.size(x.dim() - 1) : 0, " columns, wanted ", weight.inputs);
  Sizes size{device_rows(x), weight.inputs, weight.outputs, 0, 0};
  if (!adapter.lora_A.has_value()) return size;
  const Tensor &a = *adapter.lora_A, &b = *adapter.lora_B;
  check_matrix(op, "lora_A", a, x);
  check_matrix(op, "lora_B", b, x);
  STD_TORCH_CHECK(a.dim() == 2 && a.size(1) == weight.inputs, op, ": lora_A has ", a.numel(), " elements, wanted [R, ",
                  weight.inputs, "]");
  STD_TORCH_CHECK(b.dim() == 2 && b.size(0) == weight.outputs && b.size(1) == a.size(0), op, ": lora_B is not [",
                  weight.outputs, ", ", a.size(0), "]");
  size.rank = a.size(0);
  size.padded = padded_rank(size.rank);
  return size;
}

Tensor matrix(const std::optional<Tensor>& tensor) { return torch::stable::contiguous(*tensor); }

// S [T, R], and its terms with ρ where they are asked for: [T][R].
void shrink(const Tensor& x, const DeviceAdapter& adapter, const Sizes& size, const HeldTerms& a, const Tensor& s,
            const HeldTerms* terms) {
  const PassSums sums = rank_pass(dense_input(x, &adapter), &a, nullptr);
  Reduced wanted;
  wanted.scale = adapter.seed.has_value() ? 1.0 / (1.0 - adapter.dropout_p) : 1.0;
  wanted.rank_scale = adapter.rank_scale.has_value() ? &*adapter.rank_scale : nullptr;
  wanted.after = adapter.scaling;
  wanted.plain = &s;
  wanted.terms = terms;
  reduce(sums.rows, size.rank, wanted);
}

// The same S, for few tokens.
constexpr int64_t kMaxShrinkTokens = 16;

void shrink_few(const Tensor& x, const DeviceAdapter& adapter, const Sizes& size, const Tensor& s) {
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

// Of dX behind the dropout, mask/(1-p) ∘ (P A): the terms of P and A.
struct RankGradients {
  HeldTerms p, a;
};

// grad_A, grad_B and grad_rank_scale of flat dY and x, and the terms where dX is wanted.
RankGradients rank_gradients(const Tensor& x, const Tensor& flat_grad, const Tensor& flat_x,
                             const DeviceAdapter& adapter, const Sizes& size, const std::optional<Tensor>& s,
                             bool needs_grad_x, DeviceBackward* out) {
  RankGradients grads;
  const Tensor a = matrix(adapter.lora_A), b = matrix(adapter.lora_B), held_s = torch::stable::contiguous(*s);
  const int64_t padded_tokens = round_up(size.tokens, kRankTile);
  const Tensor* g = adapter.out_scale.has_value() ? &*adapter.out_scale : nullptr;
  Splitter splitter(x);
  const HeldTerms right = splitter.add(b, true, size.padded, round_up(size.outputs, kRankTile), g);
  const HeldTerms left = splitter.add(held_s, true, size.padded, padded_tokens);
  if (needs_grad_x) grads.a = splitter.add(a, true, round_up(size.inputs, kExpandTile), size.padded);
  splitter.run();
  const PassSums sums = rank_pass(dense_input(flat_grad), &right, &left);

  const HeldTerms p_transposed = empty_terms(x, kMaxTerms, size.padded, padded_tokens);
  const Tensor* rank_scale = adapter.rank_scale.has_value() ? &*adapter.rank_scale : nullptr;
  Reduced p;
  p.rank_scale = rank_scale;
  p.after = adapter.scaling;
  p.transposed = &p_transposed;
  if (needs_grad_x) {
    grads.p = terms_of_rows(x, size.tokens, size.padded);
    p.terms = &grads.p;
  }

  out->grad_B = device_empty(x, {size.outputs, size.rank}, b.scalar_type());
  Tensor products;
  Reduced grad_b;
  grad_b.row_scale = g;
  grad_b.rank_scale = rank_scale;
  grad_b.after = adapter.scaling;
  grad_b.out = &out->grad_B;
  grad_b.row_stride = size.rank;
  grad_b.rank_stride = 1;
  if (rank_scale != nullptr) {
    products = device_empty(x, {size.outputs, size.rank}, ScalarType::Float);
    grad_b.plain = &products;
  }
  reduce(sums, size.rank, p, grad_b);
  if (rank_scale != nullptr) {
    const Tensor wide = as_type(b, ScalarType::Float);
    Launcher launcher(wide);
    launcher(rank_scale_kernel, size.rank, kColumnThreads, launcher.in<float>(wide), launcher.in<float>(products),
             size.outputs, size.rank, static_cast<float>(adapter.scaling), launcher.out<float>(out->grad_rank_scale));
  }

  out->grad_A = device_empty(x, {size.rank, size.inputs}, a.scalar_type());
  Reduced grad_a;
  grad_a.scale = adapter.seed.has_value() ? 1.0 / (1.0 - adapter.dropout_p) : 1.0;
  grad_a.out = &out->grad_A;
  grad_a.row_stride = 1;
  grad_a.rank_stride = size.inputs;
  reduce(rank_pass(dense_input(flat_x, &adapter), nullptr, &p_transposed).columns, size.rank, grad_a);
  return grads;
}

// --- few tokens against NF4

bool skinny_takes(const DeviceWeight& weight, ScalarType type, int64_t tokens, const DeviceAdapter& adapter) {
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
                    const DeviceAdapter& adapter, const Sizes& size, bool bias_inside, const DeviceForward& out,
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

// --- what the operators call

std::optional<Tensor> device_seed(const char* op, double dropout_p, const std::optional<Tensor>& seed,
                                  const Tensor& like) {
  if (!seed.has_value()) return std::nullopt;
  STD_TORCH_CHECK(on_device(*seed) && seed->get_device_index() == like.get_device_index(), op,
                  ": seed is on another device than x, wanted cuda:", like.get_device_index());
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 2, op, ": seed is ",
                  torch::headeronly::toString(seed->scalar_type()), " with ", seed->numel(),
                  " elements, wanted Long with 2");
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, ": dropout_p is ", dropout_p, ", wanted 0 <= p < 1");
  return torch::stable::contiguous(*seed);
}

DeviceForward adapted_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceAdapter& adapter, bool bias_inside,
                              bool want_z) {
  const Sizes size = checked_sizes(op, x, weight, adapter);
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
  const bool low_rank = size.rank > 0, skinny = skinny_takes(weight, type, size.tokens, adapter);

  HeldTerms s_terms, b_terms;
  const DeviceGroups* groups = adapter.groups;
  if (low_rank && skinny && size.tokens <= kMaxShrinkTokens) {
    shrink_few(held, adapter, size, out.s);
  } else if (low_rank) {
    const Tensor a = matrix(adapter.lora_A), b = matrix(adapter.lora_B);
    Splitter splitter(x);
    const HeldTerms a_terms = splitter.add(a, false, size.padded, round_up(size.inputs, kRankTile));
    if (!skinny) {
      if (groups == nullptr) s_terms = terms_of_rows(x, size.tokens, size.padded);
      b_terms = splitter.add(b, false, round_up(size.outputs, kExpandTile), size.padded);
    }
    splitter.run();
    shrink(held, adapter, size, a_terms, out.s, skinny || groups != nullptr ? nullptr : &s_terms);
  }
  Tensor kept;
  if (groups != nullptr) {
    kept = select_ranks(*groups, out.s);
    if (!skinny) s_terms = split_matrix(out.s, false, round_up(size.tokens, kRankTile), size.padded);
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
      expand(y, low_rank ? &s_terms : nullptr, &b_terms, nullptr, held_bias, nullptr);
      addmm_(y, held, product, 1.0);
    } else {
      mm_out(y, held, product);
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
    expand(z, low_rank ? &s_terms : nullptr, &b_terms, nullptr, bias_first ? before : std::nullopt, nullptr);
    addmm_(z, x_of_z, product, 1.0);
  } else {
    mm_out(z, x_of_z, product);
  }
  if (drop_base) {
    mm_out(y, held, product);
    expand(y, low_rank ? &s_terms : nullptr, &b_terms, &y, after, nullptr, Scaled{z, *adapter.out_scale});
    return out;
  }
  finish(y, z, *adapter.out_scale, bias_first ? std::nullopt : before, after);
  return out;
}

DeviceBackward adapted_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceWeight& weight,
                                const DeviceAdapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x,
                                const std::optional<Tensor>& z) {
  const Sizes size = checked_sizes(op, x, weight, adapter);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim() && device_rows(grad) == size.tokens &&
                      grad.size(grad.dim() - 1) == size.outputs,
                  op, ": grad is ", torch::headeronly::toString(grad.scalar_type()), " with ", grad.numel(),
                  " elements, wanted ", torch::headeronly::toString(x.scalar_type()), " with ",
                  size.tokens * size.outputs);
  DeviceBackward out;
  const bool low_rank = size.rank > 0, drop_base = adapter.drop_base && adapter.seed.has_value();
  const auto zeros = [&](int64_t count) { return device_zeros(x, {count}, ScalarType::Float); };
  out.grad_rank_scale = zeros(adapter.rank_scale.has_value() ? size.rank : 0);
  out.grad_in_scale = zeros(adapter.in_scale.has_value() ? size.inputs : 0);
  out.grad_out_scale = zeros(z.has_value() ? size.outputs : 0);
  out.grad_x = needs_grad_x ? device_empty(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type())
                            : device_empty(x, {0}, x.scalar_type());
  if (size.tokens == 0) {
    if (low_rank) {
      out.grad_A = device_zeros(x, {size.rank, size.inputs}, adapter.lora_A->scalar_type());
      out.grad_B = device_zeros(x, {size.outputs, size.rank}, adapter.lora_B->scalar_type());
    }
    return out;
  }
  const Tensor flat_grad = flat_rows(grad), flat_x = flat_rows(x);

  HeldTerms p_terms, a_terms;
  if (low_rank) {
    const RankGradients grads = rank_gradients(x, flat_grad, flat_x, adapter, size, s, needs_grad_x, &out);
    p_terms = grads.p;
    a_terms = grads.a;
  }

  // G = g ∘ dY (with drop_base G - dY), and dg's sums in the same pass.
  const bool product = needs_grad_x || adapter.in_scale.has_value();
  Tensor scaled = flat_grad;
  if (adapter.out_scale.has_value() && (product || z.has_value())) {
    const std::optional<Tensor> other =
        z.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*z)) : std::nullopt;
    const ColumnPartials found =
        column_partials(flat_grad, product ? adapter.out_scale : std::nullopt, drop_base ? -1.0f : 0.0f, other);
    if (product) scaled = found.scaled;
    if (z.has_value()) out.grad_out_scale = reduced_columns(found.partial);
  }
  if (!product) return out;

  const Tensor w = dense_weight(weight, x.scalar_type());
  Tensor grad_x = needs_grad_x ? torch::stable::view(out.grad_x, {size.tokens, size.inputs})
                               : device_empty(x, {size.tokens, size.inputs}, x.scalar_type());
  if (drop_base) {
    const Tensor through = torch::stable::empty_like(grad_x), direct = torch::stable::empty_like(grad_x);
    if (low_rank) {
      expand(through, &p_terms, &a_terms, nullptr, std::nullopt, nullptr);
      addmm_(through, scaled, w, 1.0);
    } else {
      mm_out(through, scaled, w);
    }
    mm_out(direct, flat_grad, w);
    out.grad_x = torch::stable::view(dropped(through, adapter, direct), {x.sizes().begin(), x.sizes().end()});
    return out;
  }
  if (low_rank) {
    expand(grad_x, &p_terms, &a_terms, nullptr, std::nullopt, &adapter);
    addmm_(grad_x, scaled, w, 1.0);
  } else {
    mm_out(grad_x, scaled, w);
  }
  if (adapter.in_scale.has_value()) {
    const ColumnPartials found = column_partials(grad_x, adapter.in_scale, 0.0f, flat_x);
    out.grad_in_scale = reduced_columns(found.partial);
    if (needs_grad_x) out.grad_x = torch::stable::view(found.scaled, {x.sizes().begin(), x.sizes().end()});
  }
  return out;
}

namespace {

// Of the sizes and the device alone, for a base product that was made elsewhere.
DeviceWeight no_weight(const char* op, const DeviceAdapter& adapter) {
  const Tensor &a = *adapter.lora_A, &b = *adapter.lora_B;
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, op, ": lora_A or lora_B is no matrix");
  DeviceWeight weight;
  weight.weight = a;
  weight.outputs = b.size(0);
  weight.inputs = a.size(1);
  return weight;
}

}  // namespace

DeviceForward low_rank_forward(const char* op, const Tensor& x, const Tensor& residual, const DeviceAdapter& adapter) {
  const Sizes size = checked_sizes(op, x, no_weight(op, adapter), adapter);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(on_device(residual) && residual.get_device_index() == x.get_device_index() &&
                      residual.scalar_type() == type && residual.numel() == size.tokens * size.outputs,
                  op, ": residual is not [..., ", size.outputs, "] of x's type, on its device");
  DeviceForward out;
  out.y = device_empty(x, shape_with_last(x, size.outputs), type);
  out.s = device_empty(x, {size.tokens, size.rank}, ScalarType::Float);
  if (size.tokens == 0) return out;
  STD_TORCH_CHECK(size.inputs > 0 && size.outputs > 0 && size.rank > 0, op, ": lora_A is [", size.rank, ", ",
                  size.inputs, "] and lora_B has ", size.outputs, " rows, wanted at least one of each");
  check_kernel_dtype(op, "x", type);
  const Tensor held = flat_rows(x), onto = flat_rows(residual);
  const Tensor y = torch::stable::view(out.y, {size.tokens, size.outputs});
  const Tensor a = matrix(adapter.lora_A), b = matrix(adapter.lora_B);
  Splitter splitter(x);
  const HeldTerms a_terms = splitter.add(a, false, size.padded, round_up(size.inputs, kRankTile));
  const HeldTerms b_terms = splitter.add(b, false, round_up(size.outputs, kExpandTile), size.padded);
  splitter.run();
  const HeldTerms s_terms = terms_of_rows(x, size.tokens, size.padded);
  shrink(held, adapter, size, a_terms, out.s, &s_terms);
  expand(y, &s_terms, &b_terms, &onto, std::nullopt, nullptr);
  return out;
}

DeviceBackward low_rank_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceAdapter& adapter,
                                 const Tensor& s, bool needs_grad_x) {
  const Sizes size = checked_sizes(op, x, no_weight(op, adapter), adapter);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == size.tokens * size.outputs, op,
                  ": grad has ", grad.numel(), " elements, wanted ", size.tokens * size.outputs, " of x's type");
  DeviceBackward out;
  out.grad_rank_scale = device_zeros(x, {adapter.rank_scale.has_value() ? size.rank : 0}, ScalarType::Float);
  out.grad_x = needs_grad_x ? device_empty(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type())
                            : device_empty(x, {0}, x.scalar_type());
  if (size.tokens == 0) {
    out.grad_A = device_zeros(x, {size.rank, size.inputs}, adapter.lora_A->scalar_type());
    out.grad_B = device_zeros(x, {size.outputs, size.rank}, adapter.lora_B->scalar_type());
    return out;
  }
  const RankGradients grads = rank_gradients(x, flat_rows(grad), flat_rows(x), adapter, size, s, needs_grad_x, &out);
  if (needs_grad_x)
    expand(torch::stable::view(out.grad_x, {size.tokens, size.inputs}), &grads.p, &grads.a, nullptr, std::nullopt,
           &adapter);
  return out;
}

Tensor frozen_backward(const char* op, const Tensor& grad, const DeviceWeight& weight) {
  STD_TORCH_CHECK(on_device(grad) && grad.dim() >= 1 && grad.size(grad.dim() - 1) == weight.outputs, op, ": grad has ",
                  grad.dim() >= 1 ? grad.size(grad.dim() - 1) : 0, " columns, wanted ", weight.outputs);
  const Tensor out = device_empty(grad, shape_with_last(grad, weight.inputs), grad.scalar_type());
  if (out.numel() == 0) return out;
  mm_out(torch::stable::view(out, {device_rows(grad), weight.inputs}), flat_rows(grad),
         dense_weight(weight, grad.scalar_type()));
  return out;
}

ColumnProducts scale_columns(const Tensor& m, const std::optional<Tensor>& scale, const std::optional<Tensor>& other) {
  const int64_t columns = m.size(m.dim() - 1);
  ColumnProducts out;
  out.scaled = device_empty(m, {0}, m.scalar_type());
  out.sums = device_zeros(m, {other.has_value() ? columns : 0}, ScalarType::Float);
  const std::vector<int64_t> shape(m.sizes().begin(), m.sizes().end());
  if (m.numel() == 0) {
    if (scale.has_value()) out.scaled = device_empty(m, shape, m.scalar_type());
    return out;
  }
  const std::optional<Tensor> flat_other = other.has_value() ? std::optional<Tensor>(flat_rows(*other)) : std::nullopt;
  const ColumnPartials found = column_partials(flat_rows(m), scale, 0.0f, flat_other);
  if (scale.has_value()) out.scaled = torch::stable::view(found.scaled, shape);
  if (other.has_value()) out.sums = reduced_columns(found.partial);
  return out;
}

// --- DoRA's norm

namespace {

// A Aᵀ [R, R] float32.
Tensor gram(const Tensor& a, const HeldTerms& terms) {
  const int64_t rank = a.size(0);
  const Tensor out = device_empty(a, {rank, rank}, ScalarType::Float);
  Reduced wanted;
  wanted.plain = &out;
  reduce(rank_pass(dense_input(a), &terms, nullptr).rows, rank, wanted);
  return out;
}

DeviceWeight contiguous_weight(const DeviceWeight& weight) {
  DeviceWeight held = weight;
  held.weight = torch::stable::contiguous(weight.weight);
  return held;
}

}  // namespace

WeightNorm weight_norm(const char* op, const DeviceWeight& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling, ScalarType type) {
  DeviceAdapter adapter;
  const int64_t rows = weight.outputs, rank = lora_A.size(0);
  WeightNorm out;
  out.norm = device_empty(weight.weight, {rows}, ScalarType::Float);
  out.u = device_empty(weight.weight, {rows, rank}, ScalarType::Float);
  if (rows == 0) return out;
  const DeviceWeight held = contiguous_weight(weight);
  const Tensor a = torch::stable::contiguous(lora_A), b = as_type(torch::stable::contiguous(lora_B), ScalarType::Float);
  const HeldTerms terms = split_matrix(a, false, padded_rank(rank), round_up(weight.inputs, kRankTile));
  const PassSums sums = rank_pass(weight_input(held, type), &terms, nullptr, true);
  Reduced wanted;
  wanted.plain = &out.u;
  reduce(sums.rows, rank, wanted);
  const Tensor products = gram(a, terms);
  Launcher launcher(b);
  Norm work{};
  work.u = launcher.in<float>(out.u);
  work.squares = launcher.in<float>(sums.squares);
  work.chunks = sums.rows.chunks;
  work.padded_rows = sums.rows.padded_rows;
  work.products = launcher.in<float>(products);
  work.lora_B = launcher.in<float>(b);
  work.scaling = static_cast<float>(scaling);
  work.rows = rows;
  work.rank = rank;
  work.norm = launcher.scratch<float>(out.norm);
  launcher(dora_norm_kernel, ceil_div(rows, kNormRows), kNormThreads, work);
  return out;
}

WeightNormGradient weight_norm_backward(const char* op, const Tensor& grad, const DeviceWeight& weight,
                                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm, const Tensor& u,
                                        double scaling, ScalarType type) {
  const int64_t rows = weight.outputs, inputs = weight.inputs, rank = lora_A.size(0);
  if (rows == 0)
    return {device_zeros(lora_A, {rank, inputs}, lora_A.scalar_type()),
            device_zeros(lora_B, {rows, rank}, lora_B.scalar_type())};
  const DeviceWeight held = contiguous_weight(weight);
  const Tensor a = torch::stable::contiguous(lora_A), b = as_type(torch::stable::contiguous(lora_B), ScalarType::Float);
  const Tensor wide_a = as_type(a, ScalarType::Float);
  const Tensor held_grad = device_vector(op, "grad", grad, rows, weight.weight);
  const Tensor held_norm = device_vector(op, "norm", norm, rows, weight.weight), held_u = torch::stable::contiguous(u);
  const Tensor products = gram(a, split_matrix(a, false, padded_rank(rank), round_up(inputs, kRankTile)));
  const Tensor left = device_empty(b, {rows, rank}, ScalarType::Float);
  const Tensor grad_b = device_empty(b, {rows, rank}, ScalarType::Float);
  {
    Launcher launcher(b);
    Norm work{};
    work.u = launcher.in<float>(held_u);
    work.products = launcher.in<float>(products);
    work.lora_B = launcher.in<float>(b);
    work.scaling = static_cast<float>(scaling);
    work.rows = rows;
    work.rank = rank;
    work.norm = const_cast<float*>(launcher.in<float>(held_norm));
    work.grad = launcher.in<float>(held_grad);
    work.left = launcher.scratch<float>(left);
    work.grad_B = launcher.scratch<float>(grad_b);
    launcher(dora_norm_backward_kernel, ceil_div(rows, kNormRows), kNormThreads, work);
  }
  const HeldTerms left_terms = split_matrix(left, true, padded_rank(rank), round_up(rows, kRankTile));
  const Tensor outer = device_empty(b, {inputs, rank}, ScalarType::Float);
  const Tensor inner = device_empty(b, {rank, rank}, ScalarType::Float);
  Reduced wanted;
  wanted.plain = &outer;
  reduce(rank_pass(weight_input(held, type), nullptr, &left_terms).columns, rank, wanted);
  wanted.plain = &inner;
  reduce(rank_pass(dense_input(b), nullptr, &left_terms).columns, rank, wanted);
  const Tensor grad_a = device_empty(b, {rank, inputs}, ScalarType::Float);
  Launcher launcher(grad_a);
  NormGradA work{};
  work.outer = launcher.in<float>(outer);
  work.inner = launcher.in<float>(inner);
  work.lora_A = launcher.in<float>(wide_a);
  work.scaling = static_cast<float>(scaling);
  work.rank = rank;
  work.inputs = inputs;
  work.grad_A = launcher.scratch<float>(grad_a);
  launcher(dora_norm_grad_A_kernel, {ceil_div(inputs, kNormThreads), rank}, kNormThreads, work);
  return {as_type(grad_a, lora_A.scalar_type()), as_type(grad_b, lora_B.scalar_type())};
}

}  // namespace peft_ext