#include "linear/cpu/tiles/products.h"

#include "cpu/isa.h"
#include "linear/cpu/base_product.h"
#include "nf4/cpu/decode.h"
#include "nf4/cpu/skinny.h"

namespace peft_ext {

using torch::stable::parallel_for;

namespace {

// m [rows, columns] float32 as bfloat16 terms that add up to it, transposed: [terms, columns, rows]. An infinity or a
// NaN is its first term.
Tensor split_terms(const float* m, int64_t rows, int64_t columns, int terms) {
  Tensor out = empty({terms, columns, rows}, ScalarType::BFloat16);
  auto* to = static_cast<bf16*>(out.mutable_data_ptr());
  parallel_for(0, rows, ceil_div(kPackGrain, columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float rest = m[i * columns + j];
        for (int64_t term = 0; term < terms; ++term) {
          const bf16 value = from_float<bf16>(rest);
          to[(term * columns + j) * rows + i] = value;
          rest -= to_float(value);
          if (!(rest - rest == 0.0f)) rest = 0.0f;
        }
      }
  });
  return out;
}

// Terms [terms, rank, depth] as strips of ranks, the terms of a strip side by side.
Tensor term_strips(const Tensor& split, int terms, int64_t rank, int64_t depth, bool left) {
  Tensor out = empty({terms, strips_elements(rank, depth)}, ScalarType::BFloat16);
  const TileKernels& isa = *tile_kernels();
  const int64_t strips = ceil_div(rank, kStrip);
  const int64_t length = strips_elements(kStrip, depth);
  parallel_for(0, strips * terms, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / terms * kStrip;
      const TokenStrips work{static_cast<const bf16*>(split.const_data_ptr()) + (i % terms * rank + first) * depth,
                             min_i64(kStrip, rank - first),
                             depth,
                             nullptr,
                             nullptr,
                             0,
                             static_cast<bf16*>(out.mutable_data_ptr()) + i * length};
      (left ? isa.left_strips : isa.right_strips)(work, 0, 1);
    }
  });
  return out;
}

}  // namespace

const TileKernels* tile_kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAmx:
      return &kTileKernelsAmx;
    case Isa::kAmxEmulated:
      return &kTileKernelsAmxEmulated;
    case Isa::kAvx512Bf16:
      return &kTileKernelsAvx512Bf16;
    default:
      return nullptr;
  }
#else
  return nullptr;
#endif
}

bool tiles_accept(const FrozenWeight& weight, ScalarType type, int64_t tokens, bool forward) {
  if (type != ScalarType::BFloat16 || tile_kernels() == nullptr || tokens == 0) return false;
  if (weight.is_nf4()) return !forward || !skinny_accepts(weight, type, tokens);
  const bool small = weight.weight.numel() <= kSmallDense;
  return weight.weight.is_contiguous() && tokens >= (small ? kSmallDenseTileTokens : kDenseTileTokens);
}

namespace {

TileWeight tile_weight(const FrozenWeight& weight, float* room) {
  TileWeight out;
  out.rows = weight.out_features();
  out.columns = weight.in_features();
  out.block_shift = weight.is_nf4() ? __builtin_ctzll(static_cast<unsigned long long>(weight.blocksize)) : 0;
  out.dense = weight.is_nf4() ? nullptr : static_cast<const bf16*>(weight.weight.const_data_ptr());
  out.packed = weight.is_nf4() ? weight.weight.const_data_ptr<uint8_t>() : nullptr;
  out.absmax = weight.is_nf4() ? all_scales(weight, room) : nullptr;
  return out;
}

}  // namespace

std::vector<TileWeight> tile_weights(const std::vector<const FrozenWeight*>& weights) {
  int64_t nested = 0;
  for (const FrozenWeight* weight : weights) nested += nested_scales(*weight);
  auto* room = static_cast<float*>(scratch(Scratch::kScales, static_cast<size_t>(nested) * sizeof(float)));
  std::vector<TileWeight> out;
  for (const FrozenWeight* weight : weights) {
    out.push_back(tile_weight(*weight, room));
    room += nested_scales(*weight);
  }
  return out;
}

TileWeight tile_tokens(const Tensor& m, int64_t rows, int64_t columns, const KeepBits* keep) {
  TileWeight out;
  out.rows = rows;
  out.columns = columns;
  out.block_shift = 0;
  out.dense = static_cast<const bf16*>(m.const_data_ptr());
  out.packed = nullptr;
  out.absmax = nullptr;
  out.keep = keep != nullptr ? keep->data : nullptr;
  out.keep_words = keep != nullptr ? keep->per_row : 0;
  return out;
}

bf16* token_strips(bf16* room, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep) {
  TokenStrips work;
  work.m = static_cast<const bf16*>(m.const_data_ptr());
  work.tokens = tokens;
  work.depth = depth;
  work.scale = scale;
  work.keep = keep != nullptr ? keep->data : nullptr;
  work.keep_words = keep != nullptr ? keep->per_row : 0;
  work.strips = room;
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, ceil_div(tokens, kStrip), 1,
               [&](int64_t begin, int64_t end) { (left ? isa.left_strips : isa.right_strips)(work, begin, end); });
  return room;
}

bf16* token_strips(Scratch use, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep) {
  const size_t bytes = static_cast<size_t>(strips_elements(tokens, depth)) * sizeof(bf16);
  return token_strips(static_cast<bf16*>(scratch(use, bytes)), left, m, tokens, depth, scale, keep);
}

bool tiles_take_dropped(const Dropout& dropout, int64_t depth) {
  return drops_few(dropout) && !ranks_on_tiles() && depth <= kDroppedDepth;
}

DroppedTokens dropped_tokens_of(const Tensor& m, int64_t tokens, int64_t depth, const KeepBits& keep) {
  DroppedTokens out;
  out.first.resize(static_cast<size_t>(tokens) + 1);
  const int64_t grain = ceil_div(kPackGrain, depth + 1);
  parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      int64_t kept = 0;
      for (int64_t k = 0; k < depth; k += 32) {
        const uint32_t inside = depth - k >= 32 ? 0xffffffffu : (1u << (depth - k)) - 1;
        kept += __builtin_popcount(keep.data[t * keep.per_row + k / 32] & inside);
      }
      out.first[t + 1] = round_up(depth - kept, kDroppedStep);
    }
  });
  for (int64_t t = 0; t < tokens; ++t) out.first[t + 1] += out.first[t];
  out.held = empty({out.first[tokens]}, ScalarType::Float);
  out.entries.first = out.first.data();
  out.entries.entries = static_cast<uint32_t*>(out.held.mutable_data_ptr());
  const TokenStrips work{
      static_cast<const bf16*>(m.const_data_ptr()), tokens, depth, nullptr, keep.data, keep.per_row, nullptr};
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, tokens, grain,
               [&](int64_t begin, int64_t end) { isa.dropped_entries(work, out.entries, begin, end); });
  return out;
}

bf16* panel_scratch(int64_t elements) {
  return static_cast<bf16*>(scratch(Scratch::kPanel, static_cast<size_t>(elements) * sizeof(bf16)));
}

bool ranks_on_tiles() { return current_isa() == Isa::kAmx || current_isa() == Isa::kAmxEmulated; }

Tensor split_depth(const float* m, int64_t rows, int64_t rank, int64_t stride, bool left) {
  Tensor out = empty({rows, 3 * rank}, ScalarType::BFloat16);
  auto* to = static_cast<bf16*>(out.mutable_data_ptr());
  parallel_for(0, rows, ceil_div(kPackGrain, rank + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < rank; ++j) {
        const float value = m[i * stride + j];
        const bf16 high = from_float<bf16>(value);
        const float rest = value - to_float(high);
        const bf16 low = from_float<bf16>(rest - rest == 0.0f ? rest : 0.0f);
        bf16* row = to + i * 3 * rank + j;
        row[0] = high;
        row[rank] = left ? high : low;
        row[2 * rank] = left ? low : high;
      }
  });
  return out;
}

Tensor strips_tensor(const Tensor& m, int64_t count, int64_t depth, bool left) {
  Tensor out = empty({strips_elements(count, depth)}, ScalarType::BFloat16);
  TokenStrips work{static_cast<const bf16*>(m.const_data_ptr()), count, depth, nullptr, nullptr, 0,
                   static_cast<bf16*>(out.mutable_data_ptr())};
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, ceil_div(count, kStrip), 1,
               [&](int64_t begin, int64_t end) { (left ? isa.left_strips : isa.right_strips)(work, begin, end); });
  return out;
}

void tile_shrink(const TileWeight& m, const Tensor& a, int terms, float scale, float* out, float* squares) {
  const int64_t padded = a.size(1);
  const Tensor strips =
      term_strips(split_terms(a.const_data_ptr<float>(), m.columns, padded, terms), terms, padded, m.columns, false);
  const TileShrink work{m,   scale,  padded / kStrip, terms, static_cast<const bf16*>(strips.const_data_ptr()),
                        out, squares};
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, ceil_div(m.rows, kPanelStep), 1, [&](int64_t begin, int64_t end) {
    bf16* panel = panel_scratch(strips_elements(kPanelStep, m.columns));
    for (int64_t i = begin; i < end; ++i)
      isa.shrink(work, i * kPanelStep, min_i64((i + 1) * kPanelStep, m.rows), panel);
  });
}

Tensor tile_outer(const TileWeight& m, const float* left, int64_t padded, float scale) {
  const Tensor strips = term_strips(split_terms(left, m.rows, padded, kTerms), kTerms, padded, m.rows, true);
  Tensor out = empty({m.columns, padded}, ScalarType::Float);
  const TileOuter work{m,
                       scale,
                       padded / kStrip,
                       kTerms,
                       static_cast<const bf16*>(strips.const_data_ptr()),
                       out.mutable_data_ptr<float>()};
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, ceil_div(m.columns, kPanelStep), 1, [&](int64_t begin, int64_t end) {
    bf16* panel = panel_scratch(strips_elements(kPanelStep, m.rows));
    for (int64_t i = begin; i < end; ++i)
      isa.outer(work, i * kPanelStep, min_i64((i + 1) * kPanelStep, m.columns), panel);
  });
  return out;
}

}  // namespace peft_ext
