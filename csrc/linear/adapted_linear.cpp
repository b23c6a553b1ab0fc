// See adapted_linear.h for the formula. Which product runs:
//
//   tiles    bfloat16 on a CPU with a bfloat16 dot product: one pass writes Y (or dX) with all its terms
//   few      few tokens: W, decoded from NF4 on the way, A and B are each read once, as they lie, in float32
//   mm       all else is PyTorch's product: in place onto the low-rank term where nothing else is to be done, else in
//            float32 (W widened a panel at a time), finished in one more pass
#include "linear/adapted_linear.h"

#include <algorithm>

#include "linear/scratch.h"
#include "linear/tile_products.h"
#include "linear/wide_products.h"

namespace peft_ext {
namespace {

// ρ [padded rank], zeros beyond the rank.
Tensor rank_scales(const char* op, const Adapter& adapter, int64_t padded) {
  Tensor rho = zeros({padded});
  float* values = rho.mutable_data_ptr<float>();
  Tensor given;
  if (adapter.rank_scale.has_value()) {
    STD_TORCH_CHECK(adapter.rank_scale->numel() == adapter.rank(), op, ": rank_scale has ", adapter.rank_scale->numel(),
                    " elements, wanted ", adapter.rank());
    given = padded_vector(op, "rank_scale", *adapter.rank_scale, padded);
  }
  for (int64_t r = 0; r < adapter.rank(); ++r)
    values[r] = static_cast<float>(adapter.scaling) *
                (adapter.rank_scale.has_value() ? given.const_data_ptr<float>()[r] : 1.0f);
  return rho;
}

struct Sizes {
  int64_t tokens, in, out, rank, padded;
};

Sizes checked_sizes(const char* op, const Tensor& x, const FrozenWeight& weight, const Adapter& adapter) {
  const int64_t k = weight.in_features(), n = weight.out_features();
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, op, ": x has ", x.dim() >= 1 ? x.size(x.dim() - 1) : 0,
                  " columns, wanted ", k);
  const int64_t rank = adapter.rank();
  if (adapter.lora_A.has_value()) {
    STD_TORCH_CHECK(adapter.lora_A->dim() == 2 && adapter.lora_A->size(1) == k, op, ": lora_A has ",
                    adapter.lora_A->numel(), " elements, wanted [R, ", k, "]");
    STD_TORCH_CHECK(adapter.lora_B.has_value() && adapter.lora_B->dim() == 2 && adapter.lora_B->size(0) == n &&
                        adapter.lora_B->size(1) == rank,
                    op, ": lora_B is not [", n, ", ", rank, "]");
  }
  return {rows_of(x), k, n, rank, round_up(rank, kRankStep)};
}

// --- forward ---------------------------------------------------------------------------------------------------------

// One call. y, s and z of `out` are written by one of the three ways below.
struct Forward {
  const char* op;
  const FrozenWeight& weight;
  const Adapter& adapter;
  Sizes size;
  Tensor x;  // [T, K], contiguous
  bool bias_inside, want_z;
  std::optional<Tensor> bias, scale;  // float32, padded to kColumnStep
  AdaptedForward out;

  ScalarType type() const { return x.scalar_type(); }
  DType dtype() const { return dtype_of(op, "x", x); }
  bool drop_base() const { return adapter.drop_base && adapter.dropout.active; }
};

// Y and Z from what a product left, but for the low-rank term.
Expand finishing(const Forward& f) {
  Expand work;
  work.y = f.out.y.mutable_data_ptr();
  work.z = f.want_z ? f.out.z.mutable_data_ptr() : nullptr;
  work.dtype = f.dtype();
  work.columns = f.size.out;
  work.rank = f.size.padded;
  work.stride = round_up(f.size.out, kColumnStep);
  work.scale = floats(f.scale);
  (f.bias_inside ? work.bias_before : work.bias) = floats(f.bias);
  return work;
}

// Whether forward_few_tokens is the way: one base product, of a weight that can be read row by row.
bool few_tokens_take(const FrozenWeight& weight, ScalarType type, int64_t tokens, const Adapter& adapter) {
  if ((adapter.drop_base && adapter.dropout.active) || weight.in_features() == 0) return false;
  if (weight.is_nf4()) return skinny_takes(weight, type, tokens);
  const bool tiles = type == ScalarType::BFloat16 && tile_kernels() != nullptr;
  return tokens < (tiles ? kDenseTileTokens : kFewTokens + 1) && weight.weight.is_contiguous();
}

// x [T, K] float32 times a dense Wᵀ, in float32.
Tensor few_tokens_product(const Forward& f, const Tensor& x) {
  const Tensor y = empty({f.size.tokens, f.size.out}, ScalarType::Float);
  if (f.type() != ScalarType::BFloat16 || tile_kernels() == nullptr) {
    run_few_tokens(f.op, f.weight.weight, x, y, false);
    return y;
  }
  const TileKernels& isa = *tile_kernels();
  const Tensor held = empty({round_up(f.size.in, kTileDepth) * f.size.tokens}, ScalarType::BFloat16);
  isa.few_tokens_pack(x.const_data_ptr<float>(), f.size.tokens, f.size.in, static_cast<bf16*>(held.mutable_data_ptr()));
  const TileFewTokens work{static_cast<const bf16*>(f.weight.weight.const_data_ptr()),
                           f.size.out,
                           f.size.in,
                           f.size.tokens,
                           static_cast<const bf16*>(held.const_data_ptr()),
                           y.mutable_data_ptr<float>()};
  torch::stable::parallel_for(0, work.rows, ceil_div(kPackGrain, work.columns * work.tokens),
                              [&](int64_t begin, int64_t end) { isa.few_tokens(work, begin, end); });
  return y;
}

// y [T, N] float32 (+)= the low-rank term of x [T, K], in float32.
void few_tokens_low_rank(const Forward& f, const Tensor& x, const Tensor& y, bool accumulate) {
  const Adapter& adapter = f.adapter;
  if (adapter.groups != nullptr) return grouped_few_tokens(f.op, *adapter.groups, x, y, f.out.s);
  Tensor dropped = x;
  if (adapter.dropout.active)
    dropped = dropped_tokens(f.op, x, kept(adapter.dropout, f.size.tokens, f.size.in), adapter.dropout.scale);
  run_few_tokens(f.op, torch::stable::contiguous(*adapter.lora_A), dropped, f.out.s, false);
  const Tensor rho = rank_scales(f.op, adapter, f.size.rank);
  const Tensor left = column_pass(f.op, f.out.s, &rho, 0.0f, nullptr).scaled;
  run_few_tokens(f.op, torch::stable::contiguous(*adapter.lora_B), left, y, accumulate);
}

void forward_few_tokens(const Forward& f) {
  const Adapter& adapter = f.adapter;
  const Tensor wide = torch::stable::to(f.x, ScalarType::Float);
  Tensor scaled = wide;
  if (adapter.in_scale.has_value()) scaled = column_pass(f.op, wide, &*adapter.in_scale, 0.0f, nullptr).scaled;
  Tensor base;
  if (f.weight.is_nf4()) {
    base = skinny_product(f.op, torch::stable::to(scaled, f.type()), f.weight);
  } else {
    base = few_tokens_product(f, scaled);
  }
  if (adapter.low_rank()) few_tokens_low_rank(f, wide, base, true);
  Expand finish = finishing(f);
  finish.before = base.const_data_ptr<float>();
  finish.rank = 0;
  run_expand(finish, f.size.tokens);
}

// S [T, padded rank], into out.s too, and where the base is dropped as well the mask's bits.
struct Shrunk {
  Tensor s;
  KeepBits keep;
  GroupedS grouped;  // instead
};

Shrunk shrink_tokens(const Forward& f, bool tiles) {
  const Sizes& size = f.size;
  const Dropout& dropout = f.adapter.dropout;
  Shrunk out;
  if (f.adapter.groups != nullptr) {
    out.grouped = grouped_shrink(f.op, *f.adapter.groups, f.x, f.out.s);
    return out;
  }
  out.s = size.padded == size.rank ? f.out.s : empty({size.tokens, size.padded}, ScalarType::Float);
  float* s = out.s.mutable_data_ptr<float>();
  const Tensor right = packed(f.op, "lora_A", *f.adapter.lora_A, nullptr, nullptr, true, size.in, size.padded);
  if (tiles && ranks_on_tiles()) {
    if (dropout.active) out.keep = kept(dropout, size.tokens, size.in);
    const TileWeight tokens = tile_tokens(f.x, size.tokens, size.in, dropout.active ? &out.keep : nullptr);
    tile_shrink(tokens, right, kTerms, dropout.scale, s, nullptr);
  } else {
    RowPass pass = make_row_pass(f.x, f.dtype(), size.in, size.padded, dropout);
    pass.right = right.const_data_ptr<float>();
    pass.out = s;
    if (f.drop_base()) {
      out.keep = keep_bits(size.tokens, size.in);
      pass.keep = out.keep.data;
      pass.keep_words = out.keep.per_row;
    }
    if (size.in == 0) std::fill_n(s, out.s.numel(), 0.0f);
    run_row_pass(pass, size.tokens);
  }
  if (size.padded != size.rank) {
    Tensor given = f.out.s;
    torch::stable::copy_(given, torch::stable::narrow(out.s, 1, 0, size.rank));
  }
  return out;
}

void forward_on_tiles(const Forward& f, const Shrunk& shrunk) {
  const Sizes& size = f.size;
  const Adapter& adapter = f.adapter;
  TileForward work;
  work.weight = tile_weight(f.weight);
  work.tokens = size.tokens;
  work.x = token_strips(Scratch::kTokens, false, f.x, size.tokens, size.in, floats(adapter.in_scale), nullptr);
  work.dropped = nullptr;
  if (f.drop_base())
    work.dropped = token_strips(Scratch::kMoreTokens, false, f.x, size.tokens, size.in, nullptr, &shrunk.keep);
  work.dropped_scale = adapter.dropout.scale;
  work.rank = 0;
  Tensor strips, rows;
  GroupedTerms grouped;
  if (adapter.groups != nullptr) {
    grouped = grouped_terms(f.op, *adapter.groups, shrunk.grouped, size.tokens, size.out);
    work.terms = grouped.terms.data();
    work.first_term = grouped.first.data();
  } else if (adapter.low_rank()) {
    const Tensor rho = rank_scales(f.op, adapter, size.padded);
    const float* s = shrunk.s.const_data_ptr<float>();
    // The kernel reads whole blocks of rows of ρB.
    rows = packed(f.op, "lora_B", *adapter.lora_B, nullptr, rho.const_data_ptr<float>(), false,
                  round_up(size.out, kColumnStep), size.rank);
    if (ranks_on_tiles()) {
      work.rank_depth = 3 * size.rank;
      strips = strips_tensor(split_depth(s, size.tokens, size.rank, size.padded, false), size.tokens, work.rank_depth,
                             false);
      rows = strips_tensor(split_depth(rows.const_data_ptr<float>(), size.out, size.rank, size.rank, true), size.out,
                           work.rank_depth, true);
      work.s_strips = static_cast<const bf16*>(strips.const_data_ptr());
      work.b_strips = static_cast<const bf16*>(rows.const_data_ptr());
    } else {
      work.rank = size.rank;
      strips = lane_strips_of_rows(s, size.rank, size.padded, size.tokens);
      work.s = strips.const_data_ptr<float>();
      work.b = rows.const_data_ptr<float>();
    }
  }
  work.scale = floats(f.scale);
  work.bias_before = f.bias_inside ? floats(f.bias) : nullptr;
  work.bias = f.bias_inside ? nullptr : floats(f.bias);
  work.y = static_cast<bf16*>(f.out.y.mutable_data_ptr());
  work.z = f.want_z ? static_cast<bf16*>(f.out.z.mutable_data_ptr()) : nullptr;
  const TileKernels& isa = *tile_kernels();
  run_panels(size.out, size.in, size.tokens, 2,
             [&](int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel) {
               isa.forward(work, begin, end, first, last, panel);
             });
}

void forward_by_products(const Forward& f, const Shrunk& shrunk) {
  const Sizes& size = f.size;
  const Adapter& adapter = f.adapter;
  const ScalarType type = f.type();
  Expand finish = finishing(f);
  Tensor right;
  const auto run_finish = [&] {
    adapter.groups != nullptr ? grouped_expand(f.op, *adapter.groups, shrunk.grouped, finish)
                              : run_expand(finish, size.tokens);
  };
  if (adapter.low_rank() && adapter.groups == nullptr) {
    const Tensor rho = rank_scales(f.op, adapter, size.padded);
    right =
        packed(f.op, "lora_B", *adapter.lora_B, nullptr, rho.const_data_ptr<float>(), true, size.padded, finish.stride);
    finish.left = shrunk.s.const_data_ptr<float>();
    finish.right = right.const_data_ptr<float>();
  }
  const bool plain = !f.scale.has_value() && !f.want_z && !f.drop_base();
  const bool in_place = plain && multiplies_in(type, true) && !skinny_takes(f.weight, type, size.tokens);
  Tensor x = f.x;
  if (adapter.in_scale.has_value()) {
    // Where the product is float32's anyhow, l ∘ x is not rounded before it.
    if (!in_place && !multiplies_in(type, false)) x = torch::stable::to(x, ScalarType::Float);
    x = column_pass(f.op, x, &*adapter.in_scale, 0.0f, nullptr).scaled;
  }
  if (in_place) {
    // The product accumulates onto the other terms, so that nothing of size T x N is read or written but Y.
    const Tensor y = torch::stable::view(f.out.y, {size.tokens, size.out});
    const bool terms = adapter.low_rank() || f.bias.has_value() || size.in == 0;
    if (terms) run_finish();
    if (size.in == 0) return;
    const Tensor dense = transposed(dense_weight(f.op, f.weight, type));
    terms ? addmm_(y, x, dense, 1.0) : mm_out(y, x, dense);
    return;
  }
  const Tensor base = product_forward(f.op, x, f.weight, type);
  Tensor before = base, after;
  if (f.drop_base()) {
    before = product_forward(f.op, dropped_tokens(f.op, x, shrunk.keep, adapter.dropout.scale), f.weight, type);
    after = torch::stable::subtract(base, before);
    finish.after = after.const_data_ptr<float>();
  }
  finish.before = before.const_data_ptr<float>();
  run_finish();
}

// --- backward --------------------------------------------------------------------------------------------------------

// One call. The gradients of the adapter come first, then dX by one of two ways.
struct Backward {
  const char* op;
  const FrozenWeight& weight;
  const Adapter& adapter;
  Sizes size;
  Tensor grad, x;  // [T, N], [T, K], contiguous
  Tensor p;        // [T rounded up to 32, padded rank]; what is beyond the last token is multiplied and not stored
  KeepBits keep;   // where a mask acts and dX is wanted

  ScalarType type() const { return x.scalar_type(); }
  DType dtype() const { return dtype_of(op, "x", x); }
  bool mask() const { return adapter.dropout.active && adapter.low_rank(); }
  bool drop_base() const { return adapter.drop_base && mask(); }
  const float* g() const { return floats(adapter.out_scale); }
};

// d rank_scale [R] from Gᵀ S, whose columns are not scaled by g yet.
Tensor rank_scale_gradient(const Backward& b, const Tensor& sums) {
  const Tensor wide = packed(b.op, "lora_B", *b.adapter.lora_B, b.g(), nullptr, false, b.size.out, b.size.padded);
  const Tensor dots = column_pass(b.op, wide, nullptr, 0.0f, &sums).sums;
  Tensor out = zeros({b.size.rank});
  for (int64_t r = 0; r < b.size.rank; ++r)
    out.mutable_data_ptr<float>()[r] = static_cast<float>(b.adapter.scaling) * dots.const_data_ptr<float>()[r];
  return out;
}

// held_x: contiguous; it and what else is referred to must live as long.
Backward checked_backward(const char* op, const FrozenWeight& weight, const Adapter& adapter, const Tensor& grad,
                          const Tensor& held_x) {
  const Sizes size = checked_sizes(op, held_x, weight, adapter);
  const ScalarType type = held_x.scalar_type();
  STD_TORCH_CHECK(grad.numel() == size.tokens * size.out && grad.scalar_type() == type, op, ": grad has ", grad.numel(),
                  " elements of ", torch::headeronly::toString(grad.scalar_type()), ", wanted ", size.tokens * size.out,
                  " of ", torch::headeronly::toString(type));
  dtype_of(op, "x", held_x);
  return {op,
          weight,
          adapter,
          size,
          torch::stable::view(torch::stable::contiguous(grad), {size.tokens, size.out}),
          torch::stable::view(held_x, {size.tokens, size.in}),
          Tensor(),
          KeepBits()};
}

// P, dB and the rank scale's gradient from dY; dA from x and P; and the mask's bits for dX.
void rank_gradients(Backward* call, const std::optional<Tensor>& s, bool needs_grad_x, AdaptedBackward* out) {
  Backward& b = *call;
  const Sizes& size = b.size;
  const Adapter& adapter = b.adapter;
  STD_TORCH_CHECK(s.has_value() && s->scalar_type() == ScalarType::Float && s->numel() == size.tokens * size.rank, b.op,
                  ": s has ", s.has_value() ? s->numel() : 0, " elements, wanted ", size.tokens * size.rank);
  const Tensor rho = rank_scales(b.op, adapter, size.padded);
  const float* by_rank = rho.const_data_ptr<float>();
  const Tensor flat_s = torch::stable::view(torch::stable::contiguous(*s), {size.tokens, size.rank});
  const Tensor left =
      size.rank == size.padded ? flat_s : packed(b.op, "s", flat_s, nullptr, nullptr, false, size.tokens, size.padded);
  const Tensor right = packed(b.op, "lora_B", *adapter.lora_B, b.g(), by_rank, false, size.out, size.padded);
  b.p = empty({round_up(size.tokens, 2 * kStrip), size.padded}, ScalarType::Float);
  float* p = b.p.mutable_data_ptr<float>();
  const int64_t written = size.out > 0 ? size.tokens : 0;
  std::fill_n(p + written * size.padded, b.p.numel() - written * size.padded, 0.0f);
  Tensor sums_a, sums_b;
  if (b.type() == ScalarType::BFloat16 && ranks_on_tiles() && size.tokens > 0) {
    const TileWeight grad = tile_tokens(b.grad, size.tokens, size.out, nullptr);
    if (size.out > 0) tile_shrink(grad, right, kTerms, 1.0f, p, nullptr);
    sums_b = tile_outer(grad, left.const_data_ptr<float>(), size.padded, 1.0f);
    if (b.mask()) b.keep = kept(adapter.dropout, size.tokens, size.in);
    const TileWeight x = tile_tokens(b.x, size.tokens, size.in, b.mask() ? &b.keep : nullptr);
    sums_a = tile_outer(x, p, size.padded, adapter.dropout.scale);
  } else {
    RowPass over_grad = make_row_pass(b.grad, b.dtype(), size.out, size.padded, Dropout());
    over_grad.right = right.const_data_ptr<float>();
    over_grad.out = p;
    over_grad.left = left.const_data_ptr<float>();
    sums_b = run_outer_pass(over_grad, size.tokens);
    RowPass over_x = make_row_pass(b.x, b.dtype(), size.in, size.padded, adapter.dropout);
    over_x.left = p;
    if (b.mask() && needs_grad_x) {
      b.keep = keep_bits(size.tokens, size.in);
      over_x.keep = b.keep.data;
      over_x.keep_words = b.keep.per_row;
    }
    sums_a = run_outer_pass(over_x, size.tokens);
  }
  out->grad_B = unpacked(b.op, "lora_B", sums_b, b.g(), by_rank, false, *adapter.lora_B);
  out->grad_A = unpacked(b.op, "lora_A", sums_a, nullptr, nullptr, true, *adapter.lora_A);
  if (adapter.rank_scale.has_value()) out->grad_rank_scale = rank_scale_gradient(b, sums_b);
}

void backward_on_tiles(const Backward& b, AdaptedBackward* out) {
  const Sizes& size = b.size;
  const Adapter& adapter = b.adapter;
  TileBackward work;
  work.weight = tile_weight(b.weight);
  work.tokens = size.tokens;
  const float* scale = b.drop_base() ? nullptr : b.g();
  work.grad = token_strips(Scratch::kTokens, true, b.grad, size.tokens, size.out, scale, nullptr);
  work.more = nullptr;
  if (b.drop_base() && b.g() != nullptr) {
    Tensor shifted = empty({size.out}, ScalarType::Float);
    float* values = shifted.mutable_data_ptr<float>();
    for (int64_t i = 0; i < size.out; ++i) values[i] = b.g()[i] - 1.0f;
    work.more = token_strips(Scratch::kMoreTokens, true, b.grad, size.tokens, size.out, values, nullptr);
  }
  work.rank = 0;
  Tensor strips, rows;
  if (adapter.low_rank() && ranks_on_tiles()) {
    const Tensor a = packed(b.op, "lora_A", *adapter.lora_A, nullptr, nullptr, true, size.in, size.rank);
    work.rank_depth = 3 * size.rank;
    rows = strips_tensor(split_depth(b.p.const_data_ptr<float>(), size.tokens, size.rank, size.padded, true),
                         size.tokens, work.rank_depth, true);
    strips = strips_tensor(split_depth(a.const_data_ptr<float>(), size.in, size.rank, size.rank, false), size.in,
                           work.rank_depth, false);
    work.p_strips = static_cast<const bf16*>(rows.const_data_ptr());
    work.a_strips = static_cast<const bf16*>(strips.const_data_ptr());
  } else if (adapter.low_rank()) {
    const Tensor a = packed(b.op, "lora_A", *adapter.lora_A, nullptr, nullptr, false, size.padded, size.in);
    strips = lane_strips(a.const_data_ptr<float>(), size.padded, size.in, size.in);
    work.rank = size.padded;
    work.p = b.p.const_data_ptr<float>();
    work.a = strips.const_data_ptr<float>();
  }
  work.keep = b.mask() ? b.keep.data : nullptr;
  work.keep_words = b.keep.per_row;
  work.keep_scale = adapter.dropout.scale;
  work.in_scale = floats(adapter.in_scale);
  work.x = static_cast<const bf16*>(b.x.const_data_ptr());
  const int64_t parts = adapter.in_scale.has_value() ? ceil_div(size.tokens, kReduceTokens) : 0;
  Tensor sums = zeros({parts, size.in});
  work.grad_in_scale = sums.mutable_data_ptr<float>();
  work.grad_x = static_cast<bf16*>(out->grad_x.mutable_data_ptr());
  const TileKernels& isa = *tile_kernels();
  run_panels(size.in, size.out, size.tokens, parts > 0 ? kReduceTokens / kStrip : 2,
             [&](int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel) {
               isa.backward(work, begin, end, first, last, panel);
             });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < size.in; ++i)
      out->grad_in_scale.mutable_data_ptr<float>()[i] += sums.const_data_ptr<float>()[part * size.in + i];
}

// dX = mask/(1-p) ∘ (P A) and what the caller adds; returns what `finish` points to.
Tensor behind_dropout(const Backward& b, Expand* finish, AdaptedBackward* out) {
  finish->y = out->grad_x.mutable_data_ptr();
  finish->dtype = b.dtype();
  finish->columns = b.size.in;
  finish->rank = b.size.padded;
  finish->stride = round_up(b.size.in, kColumnStep);
  finish->dropout = b.mask() ? b.adapter.dropout : Dropout();
  if (!b.adapter.low_rank()) return Tensor();
  const Tensor right =
      packed(b.op, "lora_A", *b.adapter.lora_A, nullptr, nullptr, false, b.size.padded, finish->stride);
  finish->left = b.p.const_data_ptr<float>();
  finish->right = right.const_data_ptr<float>();
  return right;
}

void backward_by_products(const Backward& b, AdaptedBackward* out) {
  const Sizes& size = b.size;
  const Adapter& adapter = b.adapter;
  const ScalarType type = b.type();
  Expand finish;
  const Tensor right = behind_dropout(b, &finish, out);
  const bool in_place = !adapter.in_scale.has_value() && !b.drop_base() && multiplies_in(type, b.g() == nullptr);
  // Where the product is float32's anyhow, g ∘ dY is not rounded before it.
  const bool widens = b.g() != nullptr && !multiplies_in(type, false);
  const Tensor grad = widens ? torch::stable::to(b.grad, ScalarType::Float) : b.grad;
  const auto times = [&](float shift) { return column_pass(b.op, grad, &*adapter.out_scale, shift, nullptr).scaled; };
  const Tensor scaled = b.g() == nullptr || b.drop_base() ? b.grad : times(0.0f);
  if (in_place) {
    const Tensor grad_x = torch::stable::view(out->grad_x, {size.tokens, size.in});
    const bool terms = adapter.low_rank() || size.out == 0;
    if (terms) run_expand(finish, size.tokens);
    if (size.out == 0) return;
    const Tensor dense = dense_weight(b.op, b.weight, type);
    terms ? addmm_(grad_x, scaled, dense, 1.0) : mm_out(grad_x, scaled, dense);
    return;
  }
  const Tensor product = product_backward(b.op, scaled, b.weight, type);
  Tensor before, scale;
  if (b.drop_base()) {
    before = product_backward(b.op, times(-1.0f), b.weight, type);
    finish.before = before.const_data_ptr<float>();
    finish.after = product.const_data_ptr<float>();
  } else if (adapter.in_scale.has_value()) {
    out->grad_in_scale = torch::stable::view(column_pass(b.op, b.x, nullptr, 0.0f, &product).sums, {size.in});
    scale = padded_vector(b.op, "in_scale", *adapter.in_scale, finish.stride);
    finish.before = product.const_data_ptr<float>();
    finish.scale = scale.const_data_ptr<float>();
  } else {
    finish.after = product.const_data_ptr<float>();
  }
  run_expand(finish, size.tokens);
}

}  // namespace

// --- the two functions -----------------------------------------------------------------------------------------------

AdaptedForward adapted_forward(const char* op, Tensor x, const FrozenWeight& weight, const std::optional<Tensor>& bias,
                               const Adapter& adapter, bool bias_inside, bool want_z) {
  const ScratchOfCall scratch_of_call;
  check_matrix_weight(op, weight, x.scalar_type());
  const Sizes size = checked_sizes(op, x, weight, adapter);
  const ScalarType type = x.scalar_type();
  dtype_of(op, "x", x);
  if (bias.has_value())
    STD_TORCH_CHECK(bias->numel() == size.out, op, ": bias has ", bias->numel(), " elements, wanted ", size.out);
  AdaptedForward out;
  out.y = empty(with_last(x, size.out), type);
  out.s = adapter.low_rank() ? empty({size.tokens, size.rank}, ScalarType::Float) : none();
  out.z = want_z ? empty({size.tokens, size.out}, type) : none(type);
  if (size.tokens == 0) return out;
  const Tensor flat_x = torch::stable::view(torch::stable::contiguous(x), {size.tokens, size.in});
  const int64_t padded = round_up(size.out, kColumnStep);
  Forward call{op, weight, adapter, size, flat_x, bias_inside, want_z, std::nullopt, std::nullopt, out};
  if (bias.has_value()) call.bias = padded_vector(op, "bias", *bias, padded);
  if (adapter.out_scale.has_value()) call.scale = padded_vector(op, "out_scale", *adapter.out_scale, padded);
  if (size.out > 0 && few_tokens_take(weight, type, size.tokens, adapter)) {
    forward_few_tokens(call);
    return out;
  }
  const bool tiles = size.in > 0 && size.out > 0 && tiles_take(weight, type, size.tokens, true);
  const Shrunk shrunk = adapter.low_rank() ? shrink_tokens(call, tiles) : Shrunk();
  if (size.out > 0) tiles ? forward_on_tiles(call, shrunk) : forward_by_products(call, shrunk);
  return out;
}

AdaptedBackward adapted_backward(const char* op, Tensor grad, std::optional<Tensor> x, const FrozenWeight& weight,
                                 const Adapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x) {
  const ScratchOfCall scratch_of_call;
  check_matrix_weight(op, weight, grad.scalar_type());
  // Only the adapters' gradients are made of x.
  const Tensor held_x =
      x.has_value() ? torch::stable::contiguous(*x) : empty(with_last(grad, weight.in_features()), grad.scalar_type());
  Backward call = checked_backward(op, weight, adapter, grad, held_x);
  const Sizes& size = call.size;
  const ScalarType type = call.type();
  AdaptedBackward out;
  out.grad_x = none(type);
  out.grad_A = out.grad_B = out.grad_rank_scale = none();
  out.grad_in_scale = adapter.in_scale.has_value() ? zeros({size.in}) : none();
  if (adapter.low_rank()) rank_gradients(&call, s, needs_grad_x, &out);
  // The input scale's gradient comes with dX.
  if (!needs_grad_x && !adapter.in_scale.has_value()) return out;
  out.grad_x = empty({held_x.sizes().begin(), held_x.sizes().end()}, type);
  if (out.grad_x.numel() == 0) return out;
  const bool tiles = size.out > 0 && tiles_take(weight, type, size.tokens, false);
  tiles ? backward_on_tiles(call, &out) : backward_by_products(call, &out);
  return out;
}

namespace {

// Of the sizes alone, for a base product that was made elsewhere.
FrozenWeight no_weight(const Adapter& adapter) {
  FrozenWeight weight;
  weight.shape = {adapter.lora_B->size(0), adapter.lora_A->size(1)};
  return weight;
}

}  // namespace

AdaptedForward low_rank_forward(const char* op, Tensor x, const Tensor& residual, const Adapter& adapter) {
  STD_TORCH_CHECK(adapter.lora_A->dim() == 2 && adapter.lora_B->dim() == 2, op, ": lora_A or lora_B is no matrix");
  const FrozenWeight weight = no_weight(adapter);
  const Sizes size = checked_sizes(op, x, weight, adapter);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(residual.scalar_type() == type && residual.numel() == size.tokens * size.out, op,
                  ": residual is not [..., ", size.out, "] of x's type");
  AdaptedForward out;
  out.y = empty(with_last(x, size.out), type);
  out.s = empty({size.tokens, size.rank}, ScalarType::Float);
  out.z = none(type);
  if (size.tokens == 0) return out;
  const Tensor flat_x = torch::stable::view(torch::stable::contiguous(x), {size.tokens, size.in});
  const Tensor onto = torch::stable::contiguous(residual);
  const Forward call{op, weight, adapter, size, flat_x, false, false, std::nullopt, std::nullopt, out};
  Expand finish = finishing(call);
  finish.residual = onto.const_data_ptr();
  Tensor term, right;
  Shrunk shrunk;
  if (size.tokens <= kFewTokens && size.in > 0) {
    term = empty({size.tokens, size.out}, ScalarType::Float);
    few_tokens_low_rank(call, torch::stable::to(flat_x, ScalarType::Float), term, false);
    finish.before = term.const_data_ptr<float>();
    finish.rank = 0;
  } else {
    shrunk = shrink_tokens(call, type == ScalarType::BFloat16 && size.in > 0);
    const Tensor rho = rank_scales(op, adapter, size.padded);
    right =
        packed(op, "lora_B", *adapter.lora_B, nullptr, rho.const_data_ptr<float>(), true, size.padded, finish.stride);
    finish.left = shrunk.s.const_data_ptr<float>();
    finish.right = right.const_data_ptr<float>();
  }
  if (size.out > 0) run_expand(finish, size.tokens);
  return out;
}

AdaptedBackward low_rank_backward(const char* op, Tensor grad, Tensor x, const Adapter& adapter, const Tensor& s,
                                  bool needs_grad_x) {
  const FrozenWeight weight = no_weight(adapter);
  const Tensor held_x = torch::stable::contiguous(x);
  Backward call = checked_backward(op, weight, adapter, grad, held_x);
  AdaptedBackward out;
  out.grad_x = none(call.type());
  out.grad_rank_scale = out.grad_in_scale = none();
  rank_gradients(&call, s, false, &out);
  if (!needs_grad_x) return out;
  out.grad_x = empty({held_x.sizes().begin(), held_x.sizes().end()}, call.type());
  if (out.grad_x.numel() == 0) return out;
  Expand finish;
  const Tensor right = behind_dropout(call, &finish, &out);
  run_expand(finish, call.size.tokens);
  return out;
}

Tensor frozen_backward(const char* op, Tensor grad, const FrozenWeight& weight) {
  return adapted_backward(op, grad, std::nullopt, weight, Adapter(), std::nullopt, true).grad_x;
}

Dropout make_dropout(const char* op, double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (!seed.has_value()) return dropout;
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 2, op, ": seed is ",
                  torch::headeronly::toString(seed->scalar_type()), " with ", seed->numel(),
                  " elements, wanted Long with 2");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": dropout_p is ", p, ", wanted 0 <= p < 1");
  const Tensor held = torch::stable::contiguous(*seed);
  const int64_t* words = held.const_data_ptr<int64_t>();
  dropout.active = true;
  dropout.seed = static_cast<uint64_t>(words[0]);
  dropout.offset = static_cast<uint64_t>(words[1]);
  dropout.threshold = static_cast<uint32_t>(__builtin_nearbyint(p * 65536.0));
  dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  return dropout;
}

}  // namespace peft_ext
