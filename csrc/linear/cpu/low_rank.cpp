// Computes the low-rank term (S ∘ ρ) Bᵀ and the gradients of this term, as a part of the adapted layer, and alone for
// the operator lora_residual. The factors ρ [R] are scaling times rank_scale (ones if rank_scale is missing).
#include <algorithm>

#include "cpu/threads.h"
#include "linear/cpu/base_product.h"
#include "linear/cpu/call.h"
#include "linear/cpu/pass_plan.h"
#include "linear/cpu/tiles/products.h"

namespace peft_ext {

Tensor rank_scales(const char* op, const Adapter& adapter) {
  const int64_t rank = adapter.rank();
  Tensor rho = empty({rank}, ScalarType::Float);
  float* values = rho.mutable_data_ptr<float>();
  std::fill_n(values, rank, static_cast<float>(adapter.scaling));
  if (!adapter.rank_scale.has_value()) return rho;
  STD_TORCH_CHECK(adapter.rank_scale->numel() == rank, op, ": rank_scale has ", adapter.rank_scale->numel(),
                  " elements, wanted ", rank);
  const Tensor given = padded_vector(op, "rank_scale", *adapter.rank_scale, rank);
  for (int64_t r = 0; r < rank; ++r) values[r] *= given.const_data_ptr<float>()[r];
  return rho;
}

RowPass shrink_pass(const ForwardCall& f, const Tensor& a, KeepBits* keep) {
  const LinearSizes& size = f.size;
  RowPass pass = make_row_pass(f.x, f.dtype(), size.in, size.rank, f.adapter.dropout);
  pass.right = a.const_data_ptr<float>();
  pass.out = static_cast<float*>(f.out.s.mutable_data_ptr());
  if (!f.drop_base()) return pass;
  *keep = keep_bits(size.tokens, size.in);
  pass.keep = keep->data;
  pass.keep_words = keep->per_row;
  return pass;
}

Shrunk shrink_tokens(const ForwardCall& f) {
  const LinearSizes& size = f.size;
  Shrunk out;
  if (f.adapter.groups != nullptr) {
    out.grouped = grouped_shrink(f.op, *f.adapter.groups, f.x, f.out.s);
    return out;
  }
  const Tensor a = packed(f.op, "lora_A", *f.adapter.lora_A, nullptr, nullptr, false, size.rank, size.in);
  const RowPass pass = shrink_pass(f, a, &out.keep);
  if (size.in == 0) std::fill_n(pass.out, f.out.s.numel(), 0.0f);
  run_row_pass(pass, size.tokens);
  return out;
}

namespace {

// Returns the gradient of rank_scale, [R], computed from sums = Sᵀ dY [R, N]. `sums` is not multiplied by the output
// scale g; rank_scale_gradient multiplies B by g instead.
Tensor rank_scale_gradient(const BackwardCall& b, const Tensor& sums) {
  const int64_t columns = b.size.out;
  const Tensor wide = packed(b.op, "lora_B", *b.adapter.lora_B, b.g(), nullptr, true, b.size.rank, columns);
  const float *one = wide.const_data_ptr<float>(), *other = sums.const_data_ptr<float>();
  Tensor out = empty({b.size.rank}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  for (int64_t r = 0; r < b.size.rank; ++r) {
    constexpr int64_t kSide = 16;
    float sides[kSide] = {}, total = 0.0f;
    int64_t n = r * columns;
    for (; n + kSide <= (r + 1) * columns; n += kSide)
      for (int64_t i = 0; i < kSide; ++i) sides[i] += one[n + i] * other[n + i];
    for (; n < (r + 1) * columns; ++n) total += one[n] * other[n];
    for (const float side : sides) total += side;
    to[r] = static_cast<float>(b.adapter.scaling) * total;
  }
  return out;
}

}  // namespace

void rank_gradients(const std::vector<RankCall>& calls, bool needs_grad_x) {
  struct Held {
    Tensor rho, left, right;
    LateSums for_A, for_B;
  };
  std::vector<Held> held(calls.size());
  Loops before, sums, after;
  for (size_t i = 0; i < calls.size(); ++i) {
    BackwardCall& b = *calls[i].call;
    const std::optional<Tensor>& s = *calls[i].s;
    const LinearSizes& size = b.size;
    STD_TORCH_CHECK(s.has_value() && s->scalar_type() == ScalarType::Float && s->numel() == size.tokens * size.rank,
                    b.op, ": s has ", s.has_value() ? s->numel() : 0, " elements, wanted ", size.tokens * size.rank);
    held[i].rho = rank_scales(b.op, b.adapter);
    held[i].left = as_contiguous(*s);
    held[i].right = packed(&before, b.op, "lora_B", *b.adapter.lora_B, b.g(), held[i].rho.const_data_ptr<float>(), true,
                           size.rank, size.out);
    if (b.tiles) b.a = lane_strips(&before, b.op, "lora_A", *b.adapter.lora_A);
  }
  before.run(kConvertGrain);
  for (size_t i = 0; i < calls.size(); ++i) {
    BackwardCall& b = *calls[i].call;
    const LinearSizes& size = b.size;
    b.p = empty({round_up(size.tokens, 2 * kStrip), size.rank}, ScalarType::Float);
    float* p = b.p.mutable_data_ptr<float>();
    const int64_t written = size.out > 0 ? size.tokens : 0;
    std::fill_n(p + written * size.rank, b.p.numel() - written * size.rank, 0.0f);
    RowPass over_grad = make_row_pass(b.grad, b.dtype(), size.out, size.rank, Dropout());
    over_grad.right = held[i].right.const_data_ptr<float>();
    over_grad.out = p;
    over_grad.left = held[i].left.const_data_ptr<float>();
    TokenWork beside;
    if (b.strips != nullptr) {
      const float* scale = b.drop_base() ? nullptr : b.g();
      const TokenStrips strips = strips_of(b.strips, b.grad, size.tokens, size.out, scale, nullptr);
      beside = [strips, &isa = *tile_kernels()](int64_t first, int64_t last) {
        isa.left_strips(strips, first / kStrip, ceil_div(last, kStrip));
      };
    }
    held[i].for_B = outer_pass(&sums, over_grad, size.tokens, nullptr, beside);
    RowPass over_x = make_row_pass(b.x, b.dtype(), size.in, size.rank, b.adapter.dropout);
    over_x.left = p;
    if (b.mask() && needs_grad_x) {
      b.keep = keep_bits(size.tokens, size.in);
      over_x.keep = b.keep.data;
      over_x.keep_words = b.keep.per_row;
    }
    held[i].for_A = outer_pass(&sums, over_x, size.tokens, nullptr, nullptr);
  }
  sums.run(kPassGrain);
  for (size_t i = 0; i < calls.size(); ++i) {
    const BackwardCall& b = *calls[i].call;
    const Adapter& adapter = b.adapter;
    AdaptedBackward* out = calls[i].out;
    LateSums &for_A = held[i].for_A, &for_B = held[i].for_B;
    if (adapter.rank_scale.has_value()) out->grad_rank_scale = rank_scale_gradient(b, summed(&for_B));
    const float* by_rank = held[i].rho.const_data_ptr<float>();
    const float scale = adapter.dropout.active ? adapter.dropout.scale : 1.0f;
    out->grad_B = unpacked(&after, b.op, "lora_B", for_B, 1.0f, b.g(), by_rank, true, *adapter.lora_B);
    out->grad_A = unpacked(&after, b.op, "lora_A", for_A, scale, nullptr, nullptr, false, *adapter.lora_A);
  }
  after.run(kConvertGrain);
}

Tensor behind_dropout(const BackwardCall& b, Expand* finish, AdaptedBackward* out) {
  finish->y = out->grad_x.mutable_data_ptr();
  finish->dtype = b.dtype();
  finish->columns = b.size.in;
  finish->rank = b.size.rank;
  finish->stride = round_up(b.size.in, kColumnStep);
  finish->dropout = b.mask() ? b.adapter.dropout : Dropout();
  if (!b.adapter.low_rank()) return Tensor();
  const Tensor right = packed(b.op, "lora_A", *b.adapter.lora_A, nullptr, nullptr, false, b.size.rank, finish->stride);
  finish->left = b.p.const_data_ptr<float>();
  finish->right = right.const_data_ptr<float>();
  return right;
}

namespace {

// Returns a FrozenWeight that has only sizes, for an operator that does not compute the base product.
FrozenWeight no_weight(const Adapter& adapter) {
  FrozenWeight weight;
  weight.shape = {adapter.lora_B->size(0), adapter.lora_A->size(1)};
  return weight;
}

}  // namespace

AdaptedForward low_rank_forward(const char* op, Tensor x, const Tensor& residual, const Adapter& adapter) {
  STD_TORCH_CHECK(adapter.lora_A->dim() == 2 && adapter.lora_B->dim() == 2, op, ": lora_A or lora_B is no matrix");
  const FrozenWeight weight = no_weight(adapter);
  const LinearSizes size = checked_sizes(op, x, weight, adapter);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(residual.scalar_type() == type && residual.numel() == size.tokens * size.out, op,
                  ": residual is not [..., ", size.out, "] of x's type");
  AdaptedForward out;
  out.y = empty(with_last(x, size.out), type);
  out.s = empty({size.tokens, size.rank}, ScalarType::Float);
  out.z = none(type);
  if (size.tokens == 0) return out;
  const Tensor flat_x = as_shape(as_contiguous(x), {size.tokens, size.in});
  const Tensor onto = as_contiguous(residual);
  const ForwardCall call{op, weight, adapter, size, flat_x, false, false, std::nullopt, std::nullopt, out};
  Expand finish = finishing(call);
  finish.residual = onto.const_data_ptr();
  Tensor term, right;
  if (size.tokens <= kFewTokens && size.in > 0) {
    term = empty({size.tokens, size.out}, ScalarType::Float);
    const Tensor wide = as_type(flat_x, ScalarType::Float), rho = rank_scales(op, adapter);
    const Tensor dropped = adapter.dropout.active ? dropped_elements(op, wide, adapter.dropout) : wide;
    run_few_tokens(op, as_contiguous(*adapter.lora_A), dropped, out.s, false);
    const Tensor left = column_pass(op, out.s, &rho, 0.0f, nullptr).scaled;
    run_few_tokens(op, as_contiguous(*adapter.lora_B), left, term, false);
    finish.before = term.const_data_ptr<float>();
    finish.rank = 0;
  } else {
    shrink_tokens(call);
    const Tensor rho = rank_scales(op, adapter);
    right = packed(op, "lora_B", *adapter.lora_B, nullptr, rho.const_data_ptr<float>(), true, size.rank, finish.stride);
    finish.left = out.s.const_data_ptr<float>();
    finish.right = right.const_data_ptr<float>();
  }
  if (size.out > 0) run_expand(finish, size.tokens);
  return out;
}

AdaptedBackward low_rank_backward(const char* op, Tensor grad, Tensor x, const Adapter& adapter, const Tensor& s,
                                  bool needs_grad_x) {
  const FrozenWeight weight = no_weight(adapter);
  const Tensor held_x = as_contiguous(x);
  BackwardCall call = checked_backward(op, weight, adapter, grad, held_x);
  AdaptedBackward out;
  out.grad_x = none(call.type());
  out.grad_rank_scale = out.grad_in_scale = none();
  const std::optional<Tensor> held_s = s;
  rank_gradients({{&call, &held_s, &out}}, false);
  if (!needs_grad_x) return out;
  out.grad_x = empty({held_x.sizes().begin(), held_x.sizes().end()}, call.type());
  if (out.grad_x.numel() == 0) return out;
  Expand finish;
  const Tensor right = behind_dropout(call, &finish, &out);
  run_expand(finish, call.size.tokens);
  return out;
}

}  // namespace peft_ext
