// Computes the backward of the adapted layer, whose formula is in adapted_linear.h. The gradients of lora_A, lora_B and
// rank_scale are computed first (low_rank.cpp). Then dX and the gradient of in_scale are computed: by the tile kernels
// (tiles/tiles.h) if tiles_accept returns true, and otherwise with PyTorch's matrix product.
#include <vector>

#include "cpu/scratch.h"
#include "linear/cpu/base_product.h"
#include "linear/cpu/call.h"
#include "linear/cpu/tiles/products.h"
#include "packed/cpu/decode.h"

namespace peft_ext {
namespace {

// Returns whether dX of PEFT's DoRA with dropout on the base is computed by one product for the elements that dropout
// kept, and by one dot product for each dropped element.
bool rest_apart(const BackwardCall& b) {
  return b.drop_base() && b.g() != nullptr && tiles_take_dropped(b.adapter.dropout, b.size.out);
}

bool tiles_accept(const BackwardCall& b) {
  const bool plain = !b.drop_base() && !b.adapter.in_scale.has_value();
  const TileProduct product = plain ? TileProduct::kPlainBackward : TileProduct::kBackward;
  return b.size.out > 0 && tiles_accept(b.weight, b.type(), b.size.tokens, product);
}

// Returns the float32 vector by * (g - 1) + shift [N], where g is DoRA's output scale, and `by` and `shift` are
// numbers.
Tensor around_one(const BackwardCall& b, float by, float shift) {
  Tensor out = empty({b.size.out}, ScalarType::Float);
  float* values = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < b.size.out; ++i) values[i] = by * (b.g()[i] - 1.0f) + shift;
  return out;
}

// Returns the arguments of the tile kernels for one backward call. room: memory for the strips of dY (see tiles.h);
// used only if b.strips is null.
TileBackward tile_backward(const BackwardCall& b, const TileWeight& weight, bf16* room) {
  const LinearSizes& size = b.size;
  const Adapter& adapter = b.adapter;
  TileBackward work;
  work.weight = weight;
  work.tokens = size.tokens;
  const auto scaled = [&](bf16* to, float by, float shift) {
    const Tensor values = around_one(b, by, shift);
    return token_strips(to, true, b.grad, size.tokens, size.out, values.const_data_ptr<float>(), nullptr);
  };
  work.more = nullptr;
  if (rest_apart(b)) {
    work.grad = scaled(room, adapter.dropout.scale, 1.0f);
    work.given = static_cast<const bf16*>(b.grad.const_data_ptr());
  } else {
    const float* scale = b.drop_base() ? nullptr : b.g();
    work.grad = b.strips;
    if (b.strips == nullptr || !adapter.low_rank())
      work.grad =
          token_strips(b.strips != nullptr ? b.strips : room, true, b.grad, size.tokens, size.out, scale, nullptr);
    if (b.drop_base() && b.g() != nullptr) {
      const size_t bytes = static_cast<size_t>(strips_elements(size.tokens, size.out)) * sizeof(bf16);
      work.more = scaled(static_cast<bf16*>(scratch(Scratch::kMoreTokens, bytes)), 1.0f, 0.0f);
    }
  }
  work.rank = 0;
  if (adapter.low_rank()) {
    work.rank = size.rank;
    work.p = b.p.const_data_ptr<float>();
    work.a = b.a.const_data_ptr<float>();
  }
  work.keep = b.mask() ? b.keep.data : nullptr;
  work.keep_words = b.keep.per_row;
  work.keep_scale = adapter.dropout.scale;
  work.in_scale = floats(adapter.in_scale);
  work.x = static_cast<const bf16*>(b.x.const_data_ptr());
  return work;
}

// Computes the sum of the dX of several layers of one input by the tile kernels. Each element of the sum is kept in
// float32 until the products of all these layers are added. in_scale is allowed only if there is a single layer. onto:
// whether the sum is added to the values that out->grad_x already holds.
void backward_on_tiles(const std::vector<const BackwardCall*>& calls, bool onto, AdaptedBackward* out) {
  const LinearSizes& size = calls[0]->size;
  std::vector<const FrozenWeight*> weights;
  size_t elements = 0;
  int64_t tiles_of_all = 0;
  bool whole = false, apart = false;  // apart: whether the dropped elements of dX are computed by separate dot products
  for (const BackwardCall* b : calls) {
    weights.push_back(&b->weight);
    if (b->strips == nullptr) elements += strips_elements(size.tokens, b->size.out);
    tiles_of_all += ceil_div(b->size.out, kTileDepth);
    apart = apart || rest_apart(*b);
    // With dropout on the base and an output scale g, the rows of W, over which dY W sums, are not divided into parts.
    whole = whole || (b->drop_base() && b->g() != nullptr);
  }
  const int64_t part = whole ? tiles_of_all : depth_part(kBackwardCut, tiles_of_all);
  const std::vector<TileWeight> tiles = tile_weights(weights);
  bf16* room = elements > 0 ? static_cast<bf16*>(scratch(Scratch::kTokens, elements * sizeof(bf16))) : nullptr;
  const int64_t parts = calls[0]->adapter.in_scale.has_value() ? ceil_div(size.tokens, kReduceTokens) : 0;
  Tensor sums = zeros({parts, size.in});
  std::vector<TileBackward> works;
  for (size_t i = 0; i < calls.size(); ++i) {
    works.push_back(tile_backward(*calls[i], tiles[i], room));
    if (calls[i]->strips == nullptr) room += strips_elements(size.tokens, calls[i]->size.out);
    works[i].grad_in_scale = sums.mutable_data_ptr<float>();
    works[i].grad_x = static_cast<bf16*>(out->grad_x.mutable_data_ptr());
    works[i].onto = onto;
    works[i].depth_part = part;
  }
  const TileKernels& isa = *tile_kernels();
  run_panels(size.in, tiles_of_all * kTileDepth, size.tokens, parts > 0 ? kReduceTokens / kStrip : 2, kBackwardCut,
             part, apart, [&](int64_t begin, int64_t end, int64_t first, int64_t last, bf16* at, float* carried) {
               isa.backward(works.data(), static_cast<int>(works.size()), begin, end, first, last, at, carried);
             });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < size.in; ++i)
      out->grad_in_scale.mutable_data_ptr<float>()[i] += sums.const_data_ptr<float>()[part * size.in + i];
}

void backward_by_products(const BackwardCall& b, bool onto, AdaptedBackward* out) {
  const LinearSizes& size = b.size;
  const Adapter& adapter = b.adapter;
  const ScalarType type = b.type();
  Expand finish;
  const Tensor right = behind_dropout(b, &finish, out);
  if (onto) finish.residual = out->grad_x.const_data_ptr();
  const bool in_place = !adapter.in_scale.has_value() && !b.drop_base() && multiplies_in(type, b.g() == nullptr);
  // If the product runs in float32, g ∘ dY is kept in float32 and is not rounded to dY's dtype.
  const bool widens = b.g() != nullptr && !multiplies_in(type, false);
  const Tensor grad = widens ? as_type(b.grad, ScalarType::Float) : b.grad;
  const auto times = [&](float shift) { return column_pass(b.op, grad, &*adapter.out_scale, shift, nullptr).scaled; };
  const Tensor scaled = b.g() == nullptr || b.drop_base() ? b.grad : times(0.0f);
  if (in_place) {
    const Tensor grad_x = as_shape(out->grad_x, {size.tokens, size.in});
    const bool written = onto && !adapter.low_rank(), terms = adapter.low_rank() || size.out == 0;
    if (terms && !written) run_expand(finish, size.tokens);
    if (size.out == 0) return;
    const Tensor dense = working_weight(b.op, b.weight, type);
    terms || written ? addmm_(grad_x, scaled, dense, 1.0) : mm_out(grad_x, scaled, dense);
    return;
  }
  Tensor before, scale;
  if (b.drop_base() && b.g() != nullptr && products_apart(b.weight, type, size.tokens, adapter.dropout)) {
    // One product computes dX as if dropout kept every element. Each dropped element of dX is then replaced by a dot
    // product of a row of dY and a column of W.
    const Tensor by = around_one(b, adapter.dropout.scale, 1.0f);
    const Tensor product = product_backward(b.op, column_pass(b.op, grad, &by, 0.0f, nullptr).scaled, b.weight, type);
    put_dropped_dots(b.op, b.grad, b.keep, b.weight, product);
    finish.after = product.const_data_ptr<float>();
    return run_expand(finish, size.tokens);
  }
  const Tensor product = product_backward(b.op, scaled, b.weight, type);
  if (b.drop_base()) {
    before = product_backward(b.op, times(-1.0f), b.weight, type);
    finish.before = before.const_data_ptr<float>();
    finish.after = product.const_data_ptr<float>();
  } else if (adapter.in_scale.has_value()) {
    out->grad_in_scale = as_shape(column_pass(b.op, b.x, nullptr, 0.0f, &product).sums, {size.in});
    scale = padded_vector(b.op, "in_scale", *adapter.in_scale, finish.stride);
    finish.before = product.const_data_ptr<float>();
    finish.scale = scale.const_data_ptr<float>();
  } else {
    finish.after = product.const_data_ptr<float>();
  }
  run_expand(finish, size.tokens);
}

// adapted_backwards passes several layers to one call of backward_on_tiles only if kPanelStep columns of all their
// weights take at most kPanelBytes. kPanelBytes therefore also limits how much scratch memory the strips of dY of these
// layers take for each token.
constexpr int64_t kPanelBytes = int64_t{1} << 20;

}  // namespace

AdaptedBackward adapted_backward(const char* op, Tensor grad, std::optional<Tensor> x, const FrozenWeight& weight,
                                 const Adapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x,
                                 const std::optional<Tensor>& room) {
  const ScratchOfCall scratch_of_call;
  check_matrix_weight(op, weight, grad.scalar_type());
  // A layer with neither an adapter nor in_scale needs no x, because dX = dY W does not depend on x. If x is missing,
  // held_x only gives the shape of dX.
  const Tensor held_x =
      x.has_value() ? as_contiguous(*x) : empty(with_last(grad, weight.in_features()), grad.scalar_type());
  BackwardCall call = checked_backward(op, weight, adapter, grad, held_x);
  const LinearSizes& size = call.size;
  const ScalarType type = call.type();
  AdaptedBackward out;
  out.grad_x = none(type);
  out.grad_A = out.grad_B = out.grad_rank_scale = none();
  out.grad_in_scale = adapter.in_scale.has_value() ? zeros({size.in}) : none();
  call.tiles = (needs_grad_x || adapter.in_scale.has_value()) && tiles_accept(call);
  if (adapter.low_rank()) {
    if (call.tiles && !rest_apart(call)) call.strips = strips_room(Scratch::kTokens, size.tokens, size.out);
    rank_gradients({{&call, &s, &out}}, needs_grad_x);
  }
  // The gradient of in_scale is computed together with dX. Therefore dX is skipped only if the caller does not want dX
  // and there is no in_scale.
  if (!needs_grad_x && !adapter.in_scale.has_value()) return out;
  out.grad_x = room.has_value() ? *room : empty({held_x.sizes().begin(), held_x.sizes().end()}, type);
  if (out.grad_x.numel() == 0) return out;
  tiles_accept(call) ? backward_on_tiles({&call}, false, &out) : backward_by_products(call, false, &out);
  return out;
}

SiblingsBackward adapted_backwards(const char* op, const std::vector<std::optional<Tensor>>& grads, Tensor x,
                                   const std::vector<Layer>& layers, const std::vector<Tensor>& s, bool needs_grad_x) {
  const ScratchOfCall scratch_of_call;
  STD_TORCH_CHECK(grads.size() == layers.size() && s.size() == layers.size(), op, ": ", grads.size(), " gradients and ",
                  s.size(), " S of ", layers.size(), " layers");
  const Tensor held_x = as_contiguous(x);
  const ScalarType type = held_x.scalar_type();
  SiblingsBackward out;
  out.grad_x = none(type);
  std::vector<BackwardCall> calls;
  std::vector<size_t> indices;
  int64_t elements = 0;
  const auto panel_bytes = [](const BackwardCall& call) {
    return strips_elements(kPanelStep, call.size.out) * static_cast<int64_t>(sizeof(bf16));
  };
  int64_t panels = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    out.layers.emplace_back();
    AdaptedBackward& own = out.layers.back();
    own.grad_x = own.grad_A = own.grad_B = own.grad_rank_scale = own.grad_in_scale = none();
    if (!grads[i].has_value()) continue;
    check_matrix_weight(op, layers[i].weight, type);
    calls.push_back(checked_backward(op, layers[i].weight, layers[i].adapter, *grads[i], held_x));
    indices.push_back(i);
    BackwardCall& call = calls.back();
    call.tiles = needs_grad_x && tiles_accept(call);
    if (!call.tiles) continue;
    elements += strips_elements(call.size.tokens, call.size.out);
    panels += panel_bytes(call);
  }
  // If all layers that the tile kernels accept fit in one group of backward_on_tiles, the passes over dY that
  // rank_gradients runs also make the strips of dY. Otherwise the layers are multiplied in several groups, and
  // backward_on_tiles makes the strips of one group at a time, which takes less memory.
  bf16* strips = nullptr;
  if (elements > 0 && panels <= kPanelBytes && calls.size() <= kMostLayers)
    strips = static_cast<bf16*>(scratch(Scratch::kTokens, static_cast<size_t>(elements) * sizeof(bf16)));
  const std::vector<std::optional<Tensor>> held_s(s.begin(), s.end());
  std::vector<RankCall> adapted;
  for (size_t i = 0; i < calls.size(); ++i) {
    BackwardCall& call = calls[i];
    if (call.tiles && strips != nullptr) {
      call.strips = strips;
      strips += strips_elements(call.size.tokens, call.size.out);
    }
    if (call.adapter.low_rank()) adapted.push_back({&call, &held_s[indices[i]], &out.layers[indices[i]]});
  }
  rank_gradients(adapted, needs_grad_x);
  if (!needs_grad_x) return out;
  AdaptedBackward sum;
  sum.grad_x = out.grad_x = empty({held_x.sizes().begin(), held_x.sizes().end()}, type);
  if (sum.grad_x.numel() == 0) return out;
  if (calls.empty()) torch::stable::fill_(sum.grad_x, 0.0);
  bool onto = false;
  std::vector<const BackwardCall*> together;
  int64_t panel = 0;
  const auto run = [&] {
    if (!together.empty()) backward_on_tiles(together, onto, &sum);
    onto = onto || !together.empty();
    together.clear();
    panel = 0;
  };
  for (const BackwardCall& call : calls) {
    if (!call.tiles) {
      run();
      backward_by_products(call, onto, &sum);
      onto = true;
      continue;
    }
    const int64_t bytes = panel_bytes(call);
    if (panel + bytes > kPanelBytes || together.size() == kMostLayers) run();
    together.push_back(&call);
    panel += bytes;
  }
  run();
  return out;
}

Tensor frozen_backward(const char* op, Tensor grad, const FrozenWeight& weight) {
  return adapted_backward(op, grad, std::nullopt, weight, Adapter(), std::nullopt, true).grad_x;
}

}  // namespace peft_ext
