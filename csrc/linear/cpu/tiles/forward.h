// The forward for one panel of W's rows: Y = g (x Wᵀ + S (ρB)ᵀ + b₀) + b₁. Include this file after the target pragma
// and the files of an instruction set.
#pragma once

#include "linear/cpu/tiles/block.h"
#include "linear/cpu/tiles/panels.h"

namespace peft_ext {
namespace {

inline float value_at(const float* values, int64_t i, int64_t count, float otherwise) {
  return values != nullptr && i < count ? values[i] : otherwise;
}

// Computes one block of Y (and of Z, if wanted). rest: null, or for each token of the block the product of the token's
// dropped elements with W's rows from `row` on.
template <typename Left>
inline void forward_block(const TileForward& work, int64_t row, int64_t strip, const Left& rows, const float* rest,
                          Block* block, Block* base, Ahead* ahead) {
  const int64_t n = work.weight.rows, tiles = tiles_of(work.weight.columns), length = tiles * kTile;
  const auto low_rank = [&] {
    if (work.rank > 0) add_low_rank(work.b + row * work.rank, work.s + strip * work.rank * kStrip, work.rank, block);
    if (work.terms == nullptr) return;
    for (int j = 0; j < block->right; ++j)
      for (int64_t q = work.first_term[strip + j]; q < work.first_term[strip + j + 1]; ++q) {
        const TileTerm& term = work.terms[q];
        add_low_rank<true>(term.b + row * term.rank, term.s, term.rank, j, block, term.lanes);
      }
  };
  const auto scale = [&](int r) { return Row::broadcast(value_at(work.scale, row + r, n, 1.0f)); };
  block->clear();
  if (work.dropped != nullptr) {
    multiply(rows, block->left, work.dropped + strip * length, block->right, tiles, block->c, ahead);
    const Row by = Row::broadcast(work.dropped_scale);
    if (rest != nullptr) *base = *block;
    block->each([&](Row v, int, int) { return Row::mul(v, by); });
    if (rest == nullptr) *base = *block;
  }
  low_rank();
  if (work.dropped == nullptr)
    multiply(rows, block->left, work.x + strip * length, block->right, tiles, block->c, ahead);
  if (work.bias_before != nullptr)
    block->each(
        [&](Row v, int r, int) { return Row::add(v, Row::broadcast(value_at(work.bias_before, row + r, n, 0.0f))); });
  if (work.z != nullptr) store_transposed(block, work.z, strip * kStrip, work.tokens, row, n);
  if (work.dropped != nullptr) {
    // With `rest`, `base` is D = (mask ∘ x) Wᵀ, and x Wᵀ - x̃ Wᵀ = rest - (1 / (1 - p) - 1) D.
    const Row share = Row::broadcast(rest != nullptr ? 1.0f - work.dropped_scale : -1.0f);
    block->each([&](Row v, int r, int j) {
      const Row without = Row::load(base->part(r / kStrip, j) + r % kStrip * kStrip);
      return Row::fma(scale(r), v, Row::mul(without, share));
    });
    if (rest == nullptr) multiply(rows, block->left, work.x + strip * length, block->right, tiles, block->c);
  }
  if (work.scale != nullptr || work.bias != nullptr)
    block->each([&](Row v, int r, int) {
      if (work.dropped == nullptr) v = Row::mul(v, scale(r));
      return Row::add(v, Row::broadcast(value_at(work.bias, row + r, n, 0.0f)));
    });
  store_transposed(block, work.y, strip * kStrip, work.tokens, row, n, rest);
}

void forward(const TileForward& work, int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel) {
  const TileUnit unit;
  const int64_t length = tiles_of(work.weight.columns) * kTile;
  Block block, base;
  alignas(64) float rest[kBlockStrips * kStrip * kPanelStep];
  const bool apart = work.rest.first != nullptr;
  bf16* turned = panel + kPanelStep / kStrip * length;
  // Up to kFewStrips strips of tokens are multiplied with W's rows in place, without a copy in the panel: after the
  // first strip the rows are in L2, and a copy would cost more.
  const bool as_they_lie = last - first <= kFewStrips && !apart && whole_tiles(work.weight, begin, end);
  const bool one_strip = last - first == 1 && !apart && decodes_rows(work.weight);
  if (!as_they_lie && !one_strip) weight_rows(work.weight, begin, end, panel);
  if (apart) turn_rows(panel, ceil_div(end - begin, kStrip), tiles_of(work.weight.columns), turned);
  const int64_t pairs = ceil_div(last - first, kBlockStrips);
  Ahead ahead = rows_ahead(work.weight, end, pairs * ceil_div(end - begin, kRowsOfStep) * length / kTile);
  const auto run = [&](int64_t row, int64_t strip, const auto& rows) {
    block.right = static_cast<int>(min_i64(kBlockStrips, last - strip));
    block.left = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - row, kStrip)));
    forward_block(work, row, strip, rows, apart ? rest + (row - begin) : nullptr, &block, &base, &ahead);
  };
  if (one_strip) {
    for (int64_t row = begin; row < end; row += kBlockStrips * kStrip) run(row, first, decoded_rows(work.weight, row));
    return;
  }
  if (as_they_lie) {
    for (int64_t row = begin; row < end; row += kBlockStrips * kStrip)
      for (int64_t strip = first; strip < last; strip += kBlockStrips)
        run(row, strip, rows_of(work.weight.dense + row * work.weight.columns, work.weight.columns));
    return;
  }
  for (int64_t strip = first; strip < last; strip += kBlockStrips) {
    if (apart) dropped_product(work, end - begin, strip * kStrip, turned, rest);
    for (int64_t row = begin; row < end; row += kBlockStrips * kStrip)
      run(row, strip, panel + (row - begin) / kStrip * length);
  }
}

}  // namespace
}  // namespace peft_ext
