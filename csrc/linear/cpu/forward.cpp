// Computes the forward of the adapted layer, whose formula is in adapted_linear.h. The base product is computed in one
// of three ways:
//
//   tiles:   If tiles_accept returns true (bfloat16 on a CPU with bfloat16 products, and enough tokens), one pass of
//            the tile kernels (tiles/tiles.h) writes Y with all terms of Y.
//   few:     For few tokens, W (its codes, if W is packed), A and B are read in the order in which they are stored
//            (few_layers.h).
//   mm:      In all other cases, PyTorch's matrix product is used (or skinny_product, for few tokens, a packed weight
//            and dropout on the base). If the product runs in x's dtype and Y is only the sum of the product, the
//            low-rank term and the bias, PyTorch adds the product in place to the other terms. Otherwise another pass
//            computes Y from the product, in float32.
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "linear/cpu/base_product.h"
#include "linear/cpu/call.h"
#include "linear/cpu/few_layers.h"
#include "linear/cpu/tiles/products.h"
#include "packed/cpu/decode.h"
#include "packed/cpu/skinny.h"

namespace peft_ext {
namespace {

// Computes several calls of few tokens with the same x.
void forward_few_tokens(const std::vector<ForwardCall>& calls) {
  const ForwardCall& first = calls[0];
  FewLayers layers(first.op, first.type(), first.size.tokens, first.size.in);
  std::vector<FewLayers::Results> results;
  for (const ForwardCall& f : calls) {
    layers.add(f.weight, f.adapter, f.size, f.bias, f.bias_inside, f.scale);
    results.push_back({f.out.y.mutable_data_ptr(), f.adapter.low_rank() ? f.out.s.mutable_data_ptr<float>() : nullptr,
                       f.want_z ? f.out.z.mutable_data_ptr() : nullptr});
  }
  layers.run(first.x.const_data_ptr(), results);
}

// The memory to which the TileForward of one call refers, and other operands of this call.
struct TileOperands {
  // In this order: A [R, K], ρ [R], ρB [N rounded up to kColumnStep, R], and the strips of S; all are float32.
  Tensor a, rho, rows, strips;
  KeepBits keep;  // bits of the dropout mask, if drop_base() is true
  const bf16* dropped = nullptr;
  GroupedS grouped_s;
  GroupedTerms grouped;
  DroppedTokens rest;
};

// Returns whether the second base product of PEFT's DoRA with dropout on the base uses only the elements that dropout
// drops.
bool rest_apart(const ForwardCall& f) { return f.drop_base() && tiles_take_dropped(f.adapter.dropout, f.size.in); }

// Returns how many tiles, of kTileDepth columns of x each, one part of the sum over x's columns has. With dropout on
// the base, the sum is not divided into parts.
int64_t tiles_in_part(const ForwardCall& f) {
  const int64_t tiles = ceil_div(f.size.in, kTileDepth);
  return f.drop_base() ? tiles : depth_part(kForwardCut, tiles);
}

// Reads x once for all calls, which have the same x (for a mixed batch, a second time for S): computes S and the strips
// of S of each call, the strips of mask ∘ x of a call with drop_base(), and the right strips of x, which the function
// returns. If `apart` is true (the dropped elements are multiplied separately), no strips of x are made.
const bf16* shrink_on_tiles(const std::vector<ForwardCall>& calls, bool apart, std::vector<TileOperands>* operands) {
  const ForwardCall& first_call = calls[0];
  const LinearSizes& size = first_call.size;
  Loops packing;
  std::vector<RowPass> passes;
  struct Strips {
    int64_t rank;
    const float* s;
    float* strips;
  };
  std::vector<Strips> of_s;
  for (size_t i = 0; i < calls.size(); ++i) {
    const ForwardCall& f = calls[i];
    const Adapter& adapter = f.adapter;
    TileOperands& held = (*operands)[i];
    if (adapter.groups != nullptr) held.grouped_s = grouped_shrink(f.op, *adapter.groups, f.x, f.out.s);
    if (adapter.groups != nullptr || !adapter.low_rank()) continue;
    const int64_t rank = f.size.rank;
    held.rho = rank_scales(f.op, adapter);
    held.a = packed(&packing, f.op, "lora_A", *adapter.lora_A, nullptr, nullptr, false, rank, size.in);
    // The tile kernel reads whole blocks of kColumnStep rows of ρB.
    held.rows = packed(&packing, f.op, "lora_B", *adapter.lora_B, nullptr, held.rho.const_data_ptr<float>(), false,
                       round_up(f.size.out, kColumnStep), rank);
    held.strips = empty({ceil_div(size.tokens, kStrip), rank, kStrip}, ScalarType::Float);
    passes.push_back(shrink_pass(f, held.a, &held.keep));
    of_s.push_back({rank, passes.back().out, held.strips.mutable_data_ptr<float>()});
  }
  packing.run(kConvertGrain);
  bf16* x = apart ? nullptr : strips_room(Scratch::kTokens, size.tokens, size.in);
  std::vector<TokenStrips> strips;
  if (x != nullptr)
    strips.push_back(strips_of(x, first_call.x, size.tokens, size.in, floats(first_call.adapter.in_scale), nullptr));
  if (first_call.drop_base()) {
    TileOperands& held = operands->front();
    bf16* room = strips_room(Scratch::kMoreTokens, size.tokens, size.in);
    strips.push_back(strips_of(room, first_call.x, size.tokens, size.in, nullptr, &held.keep));
    held.dropped = room;
  }
  constexpr int64_t kStripsCost = 4;  // cost of converting an element of x to strips, in multiplications
  const TileKernels& isa = *tile_kernels();
  run_row_passes(
      passes, size.tokens,
      [&](int64_t first, int64_t last) {
        const int64_t from = first / kStrip, to = ceil_div(last, kStrip);
        for (const Strips& s : of_s) lane_strips_of_rows(s.s, s.rank, size.tokens, from, to, s.strips);
        for (const TokenStrips& work : strips) isa.right_strips(work, from, to);
      },
      kStripsCost * size.in * static_cast<int64_t>(strips.size()));
  return x;
}

TileForward tile_forward(const ForwardCall& f, const TileWeight& weight, const bf16* x, TileOperands* held) {
  const LinearSizes& size = f.size;
  const Adapter& adapter = f.adapter;
  TileForward work;
  work.weight = weight;
  work.depth_part = tiles_in_part(f);
  work.tokens = size.tokens;
  work.x = x;
  work.dropped = held->dropped;
  work.dropped_scale = adapter.dropout.scale;
  if (rest_apart(f)) {
    held->rest = dropped_tokens_of(f.x, size.tokens, size.in, held->keep);
    work.rest = held->rest.entries;
  }
  work.rank = 0;
  if (adapter.groups != nullptr) {
    held->grouped = grouped_terms(f.op, *adapter.groups, held->grouped_s, size.tokens, size.out);
    work.terms = held->grouped.terms.data();
    work.first_term = held->grouped.first.data();
  } else if (adapter.low_rank()) {
    work.rank = size.rank;
    work.s = held->strips.const_data_ptr<float>();
    work.b = held->rows.const_data_ptr<float>();
  }
  work.scale = floats(f.scale);
  work.bias_before = f.bias_inside ? floats(f.bias) : nullptr;
  work.bias = f.bias_inside ? nullptr : floats(f.bias);
  work.y = static_cast<bf16*>(f.out.y.mutable_data_ptr());
  work.z = f.want_z ? static_cast<bf16*>(f.out.z.mutable_data_ptr()) : nullptr;
  return work;
}

// Computes the forward of several calls with one x by the tile kernels. The panels of all weights form one list, which
// is divided among the threads.
void forward_on_tiles(const std::vector<ForwardCall>& calls) {
  const LinearSizes& size = calls[0].size;
  std::vector<const FrozenWeight*> weights;
  for (const ForwardCall& f : calls) weights.push_back(&f.weight);
  const std::vector<TileWeight> tiles = tile_weights(weights);
  const bool apart = rest_apart(calls[0]);  // `apart` is false for several layers of one input, which have no drop_base
  std::vector<TileOperands> held(calls.size());
  const bf16* x = shrink_on_tiles(calls, apart, &held);
  std::vector<TileForward> works;
  std::vector<int64_t> ends;  // end of each W's rows in one list; every W but the last is padded to whole panels
  int64_t rows = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    works.push_back(tile_forward(calls[i], tiles[i], x, &held[i]));
    rows = round_up(rows, kPanelStep) + calls[i].size.out;
    ends.push_back(rows);
  }
  const TileKernels& isa = *tile_kernels();
  run_panels(rows, size.in, size.tokens, 2, kForwardCut, works[0].depth_part, apart,
             [&](int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel, float* sums) {
               for (size_t i = 0; i < works.size(); ++i) {
                 const int64_t base = i == 0 ? 0 : round_up(ends[i - 1], kPanelStep);
                 const int64_t from = std::max(begin, base), to = min_i64(end, ends[i]);
                 if (from < to) isa.forward(works[i], from - base, to - base, first, last, panel, sums);
               }
             });
}

// Sets every row of a float32 matrix to `row`.
void fill_rows(const Tensor& matrix, const float* row) {
  const int64_t columns = matrix.size(1);
  float* to = matrix.mutable_data_ptr<float>();
  parallel_for(0, matrix.size(0), ceil_div(kPackGrain, columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) memcpy(to + t * columns, row, static_cast<size_t>(columns) * sizeof(float));
  });
}

void forward_by_products(const ForwardCall& f) {
  const Shrunk shrunk = f.adapter.low_rank() ? shrink_tokens(f) : Shrunk();
  const LinearSizes& size = f.size;
  const Adapter& adapter = f.adapter;
  const ScalarType type = f.type();
  Expand finish = finishing(f);
  Tensor right;
  const auto run_finish = [&] {
    adapter.groups != nullptr ? grouped_expand(f.op, *adapter.groups, shrunk.grouped, finish)
                              : run_expand(finish, size.tokens);
  };
  if (adapter.low_rank() && adapter.groups == nullptr) {
    const Tensor rho = rank_scales(f.op, adapter);
    right =
        packed(f.op, "lora_B", *adapter.lora_B, nullptr, rho.const_data_ptr<float>(), true, size.rank, finish.stride);
    finish.left = f.out.s.const_data_ptr<float>();
    finish.right = right.const_data_ptr<float>();
  }
  const bool plain = !f.scale.has_value() && !f.want_z && !f.drop_base();
  const bool in_place = plain && multiplies_in(type, true) && !skinny_accepts(f.weight, type, size.tokens);
  Tensor x = f.x;
  if (adapter.in_scale.has_value()) {
    // If the product runs in float32, l ∘ x is kept in float32 and is not rounded to x's dtype.
    if (!in_place && !multiplies_in(type, false)) x = as_type(x, ScalarType::Float);
    x = column_pass(f.op, x, &*adapter.in_scale, 0.0f, nullptr).scaled;
  }
  if (in_place) {
    // PyTorch adds the product to the other terms, which Y already holds, so that no second matrix of size T x N is
    // needed.
    const Tensor y = as_shape(f.out.y, {size.tokens, size.out});
    const bool terms = adapter.low_rank() || f.bias.has_value() || size.in == 0;
    if (terms) run_finish();
    if (size.in == 0) return;
    const Tensor dense = transposed(working_weight(f.op, f.weight, type));
    terms ? addmm_(y, x, dense, 1.0) : mm_out(y, x, dense);
    return;
  }
  // `there`: whether PyTorch writes the product, in float32, into the memory of Z or Y, which run_finish then changes
  // in place.
  const bool there =
      type == ScalarType::Float && !f.drop_base() && size.in > 0 && !skinny_accepts(f.weight, type, size.tokens);
  Tensor before, after;
  if (there) {
    before = as_shape(f.want_z ? f.out.z : f.out.y, {size.tokens, size.out});
    const Tensor dense = transposed(working_weight(f.op, f.weight, type));
    if (finish.rank == 0 && finish.bias_before != nullptr) {  // as nn.Linear does, addmm_ adds x Wᵀ to the bias
      fill_rows(before, finish.bias_before);
      addmm_(before, x, dense, 1.0);
      finish.bias_before = nullptr;
    } else {
      mm_out(before, x, dense);
    }
    if (finish.rank == 0 && finish.bias_before == nullptr) finish.z = nullptr;  // the tensor `before` already holds Z
  } else if (!f.drop_base()) {
    before = product_forward(f.op, x, f.weight, type);
  } else {
    const float scale = adapter.dropout.scale;
    const bool apart = products_apart(f.weight, type, size.tokens, adapter.dropout);
    Dropout dropout = adapter.dropout;
    // If the dropped elements are multiplied separately, the product with the kept elements uses mask ∘ x without the
    // factor 1/(1-p), because the multiplication of x by this factor would round the values.
    if (apart) dropout.scale = 1.0f;
    before = product_forward(f.op, dropped_elements(f.op, x, dropout), f.weight, type);
    if (apart) {
      const auto times = [&](float by) {
        const Tensor all = empty({size.out}, ScalarType::Float);
        std::fill_n(all.mutable_data_ptr<float>(), size.out, by);
        return column_pass(f.op, before, &all, 0.0f, nullptr).scaled;
      };
      // x Wᵀ - x̃ Wᵀ = (dropped elements of x) Wᵀ - (scale - 1) (kept elements of x) Wᵀ, where scale is 1/(1-p).
      after = times(1.0f - scale);
      add_dropped_product(f.op, x, shrunk.keep, f.weight, after);
      before = times(scale);
    } else {
      after = torch::stable::subtract(product_forward(f.op, x, f.weight, type), before);
    }
    finish.after = after.const_data_ptr<float>();
  }
  finish.before = before.const_data_ptr<float>();
  run_finish();
}

}  // namespace

namespace {

// Checks the arguments of a call of the forward, and allocates y, s and z unless `room` is given. x is [..., K],
// contiguous.
ForwardCall checked_forward(const char* op, const Tensor& x, const FrozenWeight& weight,
                            const std::optional<Tensor>& bias, const Adapter& adapter, bool bias_inside, bool want_z,
                            const AdaptedForward* room = nullptr) {
  check_matrix_weight(op, weight, x.scalar_type());
  const LinearSizes size = checked_sizes(op, x, weight, adapter);
  const ScalarType type = x.scalar_type();
  dtype_of(op, "x", x);
  check_bias(op, bias, size);
  AdaptedForward out;
  if (room != nullptr) {
    out = *room;
  } else {
    out.y = empty(with_last(x, size.out), type);
    out.s = adapter.low_rank() ? empty({size.tokens, size.rank}, ScalarType::Float) : none();
    out.z = want_z ? empty({size.tokens, size.out}, type) : none(type);
  }
  const Tensor flat_x = as_shape(x, {size.tokens, size.in});
  const int64_t padded = round_up(size.out, kColumnStep);
  ForwardCall call{op, weight, adapter, size, flat_x, bias_inside, want_z, std::nullopt, std::nullopt, out};
  if (size.tokens == 0) return call;
  if (bias.has_value()) call.bias = padded_vector(op, "bias", *bias, padded);
  if (adapter.out_scale.has_value()) call.scale = padded_vector(op, "out_scale", *adapter.out_scale, padded);
  return call;
}

bool few_tokens_accept(const ForwardCall& f) {
  return f.size.out > 0 && few_tokens_accept(f.weight, f.type(), f.size.tokens, f.adapter);
}

bool tiles_accept(const ForwardCall& f) {
  return f.size.in > 0 && f.size.out > 0 && tiles_accept(f.weight, f.type(), f.size.tokens, TileProduct::kForward);
}

void run_forward(const ForwardCall& call) {
  if (call.size.tokens == 0) return;
  if (few_tokens_accept(call)) return forward_few_tokens({call});
  if (call.size.out > 0)
    tiles_accept(call) ? forward_on_tiles({call}) : forward_by_products(call);
  else if (call.adapter.low_rank())
    shrink_tokens(call);
}

}  // namespace

AdaptedForward adapted_forward(const char* op, Tensor x, const FrozenWeight& weight, const std::optional<Tensor>& bias,
                               const Adapter& adapter, bool bias_inside, bool want_z, const AdaptedForward* room) {
  const ScratchOfCall scratch_of_call;
  const ForwardCall call = checked_forward(op, as_contiguous(x), weight, bias, adapter, bias_inside, want_z, room);
  run_forward(call);
  return call.out;
}

std::vector<AdaptedForward> adapted_forwards(const char* op, Tensor x, const std::vector<Layer>& layers) {
  const ScratchOfCall scratch_of_call;
  const Tensor held_x = as_contiguous(x);
  std::vector<ForwardCall> calls, few, on_tiles;
  for (const Layer& layer : layers) {
    calls.push_back(checked_forward(op, held_x, layer.weight, layer.bias, layer.adapter, false, false));
    const ForwardCall& call = calls.back();
    if (call.size.tokens > 0 && few_tokens_accept(call)) {
      few.push_back(call);
    } else if (call.size.tokens > 0 && tiles_accept(call)) {
      on_tiles.push_back(call);
    } else {
      run_forward(call);
    }
  }
  if (!few.empty()) forward_few_tokens(few);
  if (!on_tiles.empty()) forward_on_tiles(on_tiles);
  std::vector<AdaptedForward> out;
  for (const ForwardCall& call : calls) out.push_back(call.out);
  return out;
}

}  // namespace peft_ext
