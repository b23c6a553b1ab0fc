// The backward: see adapted_linear.h for the formula. The adapter's gradients come first (low_rank.cpp), then dX, by
// the tiles or by PyTorch's product as in forward.cpp.
#include "cpu/scratch.h"
#include "linear/cpu/base_product.h"
#include "linear/cpu/call.h"
#include "linear/cpu/tiles/products.h"
#include "nf4/cpu/decode.h"

namespace peft_ext {
namespace {

void backward_on_tiles(const BackwardCall& b, AdaptedBackward* out) {
  const LinearSizes& size = b.size;
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

void backward_by_products(const BackwardCall& b, AdaptedBackward* out) {
  const LinearSizes& size = b.size;
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

AdaptedBackward adapted_backward(const char* op, Tensor grad, std::optional<Tensor> x, const FrozenWeight& weight,
                                 const Adapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x) {
  const ScratchOfCall scratch_of_call;
  check_matrix_weight(op, weight, grad.scalar_type());
  // Only the adapters' gradients are made of x.
  const Tensor held_x =
      x.has_value() ? torch::stable::contiguous(*x) : empty(with_last(grad, weight.in_features()), grad.scalar_type());
  BackwardCall call = checked_backward(op, weight, adapter, grad, held_x);
  const LinearSizes& size = call.size;
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
  const bool tiles = size.out > 0 && tiles_accept(weight, type, size.tokens, false);
  tiles ? backward_on_tiles(call, &out) : backward_by_products(call, &out);
  return out;
}

Tensor frozen_backward(const char* op, Tensor grad, const FrozenWeight& weight) {
  return adapted_backward(op, grad, std::nullopt, weight, Adapter(), std::nullopt, true).grad_x;
}

}  // namespace peft_ext
