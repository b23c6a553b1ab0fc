// Runs the tile kernels on all threads: selects the instruction set, decides which calls the tiles accept, and converts
// weights and activations to the operands of tiles.h.
#include "linear/cpu/tiles/products.h"

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "linear/cpu/base_product.h"
#include "packed/cpu/decode.h"
#include "packed/cpu/skinny.h"

namespace peft_ext {

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
#elif defined(PEFT_EXT_ARM_BF16)
  return current_isa() == Isa::kNeonBf16 ? &kTileKernelsNeonBf16 : nullptr;
#else
  return nullptr;
#endif
}

namespace {

bool on_amx() { return current_isa() == Isa::kAmx || current_isa() == Isa::kAmxEmulated; }

// Returns whether the tile kernels should compute a product of a dense weight with `tokens` tokens, mostly because the
// tile kernels are faster than the alternative. In the forward, the alternative to the tile kernels is TileFewTokens on
// x86-64, and on Arm PassKernels::few_tokens for up to kFewTokens tokens and PyTorch's product for more tokens. For dX,
// the alternative to the tile kernels is PyTorch's product. The bounds in enough_tokens are measured. With AVX512-BF16
// the tile kernels copy W into panels, which pays off in the forward if the tokens fill most of a strip. A large weight
// is read from memory and not from a cache, and copying a large weight pays off only for more tokens. If the tokens
// fill one strip and less than half of a second strip, the tile kernels of AVX512-BF16 are slower for weights of more
// than 2²⁰ elements. In the forward, AMX multiplies the rows of W without a copy if a row consists of whole tiles, so
// that few tokens are enough. For dX, AMX must interleave W's rows, which takes longer than the products, except for a
// small weight, where the overhead of the call dominates. From 128 tokens on, AMX computes a plain dX (kPlainBackward)
// although AMX is about 7% slower than PyTorch's product, because the bits of AMX's dX do not depend on the number of
// threads.
bool enough_tokens(const Tensor& weight, TileProduct product, int64_t tokens) {
  constexpr int64_t kSmall = int64_t{1} << 20, kLarge = int64_t{1} << 23;
  const int64_t elements = weight.numel();
  if (current_isa() == Isa::kAvx512Bf16) {
    if (product == TileProduct::kPlainBackward) return tokens >= (elements <= kLarge ? 2 : 8);
    if (product == TileProduct::kBackward) return tokens >= (elements <= kSmall ? 2 : 8);
    if (elements > kSmall && tokens > kStrip && tokens < kStrip * 3 / 2) return false;
    return tokens >= (elements <= kLarge ? 9 : 12);
  }
  if (on_amx() && product == TileProduct::kForward) return tokens >= (weight.size(1) % kTileDepth == 0 ? 3 : 8);
  if (on_amx() && product == TileProduct::kPlainBackward) return tokens >= (elements <= kSmall / 2 ? 4 : 128);
  return tokens >= (elements <= kSmall ? 17 : 24);
}

}  // namespace

bool tiles_accept(const FrozenWeight& weight, ScalarType type, int64_t tokens, TileProduct product) {
  if (type != ScalarType::BFloat16 || tile_kernels() == nullptr || tokens == 0) return false;
  if (weight.is_packed()) return product != TileProduct::kForward || !skinny_accepts(weight, type, tokens);
  return weight.weight.is_contiguous() && enough_tokens(weight.weight, product, tokens);
}

bool tiles_take_few_tokens(ScalarType type) {
  const TileKernels* tiles = type == ScalarType::BFloat16 ? tile_kernels() : nullptr;
  return tiles != nullptr && tiles->few_tokens != nullptr;
}

namespace {

TileWeight tile_weight(const FrozenWeight& weight, float* room) {
  TileWeight out{};
  out.rows = weight.out_features();
  out.columns = weight.in_features();
  if (!weight.is_packed()) {
    out.dense = static_cast<const bf16*>(weight.weight.const_data_ptr());
  } else if (weight.is_nf4()) {
    out.block_shift = __builtin_ctzll(static_cast<unsigned long long>(weight.blocksize()));
    out.packed = weight.weight.const_data_ptr<uint8_t>();
    out.absmax = all_scales(weight, room);
  } else {
    const FormatKernels& kernels = format_kernels(weight.layout);
    out.decode = kernels.decode;
    out.view = view_of(weight);
    const auto prefetch = [&](int part, const Tensor& held) {
      const int64_t bytes = held.numel() * static_cast<int64_t>(held.element_size());
      if (out.rows == 0 || out.columns == 0 || bytes % out.rows != 0) return;
      out.row_bytes[part] = bytes / out.rows;
      out.step_bytes[part] = kPanelStep * out.row_bytes[part] / out.columns;
    };
    if (kernels.row_major) prefetch(0, weight.weight);
    if (kernels.row_major && weight.parts[0].has_value()) prefetch(1, *weight.parts[0]);
  }
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

TokenStrips strips_of(bf16* room, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                      const KeepBits* keep) {
  TokenStrips work;
  work.m = static_cast<const bf16*>(m.const_data_ptr());
  work.tokens = tokens;
  work.depth = depth;
  work.scale = scale;
  work.keep = keep != nullptr ? keep->data : nullptr;
  work.keep_words = keep != nullptr ? keep->per_row : 0;
  work.strips = room;
  return work;
}

bf16* strips_room(Scratch use, int64_t tokens, int64_t depth) {
  return static_cast<bf16*>(scratch(use, static_cast<size_t>(strips_elements(tokens, depth)) * sizeof(bf16)));
}

bf16* token_strips(bf16* room, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep) {
  const TokenStrips work = strips_of(room, m, tokens, depth, scale, keep);
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, ceil_div(tokens, kStrip), ceil_div(kConvertGrain, kStrip * (depth + 1)),
               [&](int64_t begin, int64_t end) { (left ? isa.left_strips : isa.right_strips)(work, begin, end); });
  return room;
}

bf16* token_strips(Scratch use, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep) {
  return token_strips(strips_room(use, tokens, depth), left, m, tokens, depth, scale, keep);
}

bool tiles_take_dropped(const Dropout& dropout, int64_t depth) {
  return drops_few(dropout) && !on_amx() && depth <= kDroppedDepth;
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

}  // namespace peft_ext
