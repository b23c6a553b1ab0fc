// Computes the forward for one panel of W's rows: Y = g (x Wᵀ + S (ρB)ᵀ + b₀) + b₁, or the formula of TileForward
// (tiles.h) if dropout acts on the base too. Include this file after the target pragma (cpu/target_<isa>.h) and the
// files of an instruction set (see block.h).
#pragma once

#include "linear/cpu/tiles/block.h"
#include "linear/cpu/tiles/panels.h"

namespace peft_ext {
namespace {

inline float value_at(const float* values, int64_t i, int64_t count, float otherwise) {
  return values != nullptr && i < count ? values[i] : otherwise;
}

// Adds the products over `tiles` tiles of the depth, from tile `from` on, to the sums of one block. After the last tile
// of the depth, forward_block computes the block of Y (and of Z, if wanted) from the sums. rest: null, or for each
// token of the block the product of the token's dropped elements with W's rows from `row` on.
template <typename Left>
inline void forward_block(const TileForward& work, int64_t row, int64_t strip, int64_t from, int64_t tiles,
                          const Left& rows, const float* rest, Block* block, Block* base, Ahead* ahead) {
  const int64_t n = work.weight.rows, depth = tiles_of(work.weight.columns), length = depth * kTile;
  const auto lanes = [&](const bf16* strips) { return Strips{strips + strip * length + from * kTile, length}; };
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
  if (from == 0) {
    block->clear();
    if (work.dropped != nullptr) {
      multiply(rows, block->left, lanes(work.dropped), block->right, tiles, block->c, ahead);
      const Row by = Row::broadcast(work.dropped_scale);
      if (rest != nullptr) base->copy_from(*block);
      block->each([&](Row v, int, int) { return Row::mul(v, by); });
      if (rest == nullptr) base->copy_from(*block);
    }
    low_rank();
  }
  if (work.dropped == nullptr) multiply(rows, block->left, lanes(work.x), block->right, tiles, block->c, ahead);
  if (from + tiles < depth) return;
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
    if (rest == nullptr) multiply(rows, block->left, lanes(work.x), block->right, tiles, block->c);
  }
  if (work.scale != nullptr || work.bias != nullptr)
    block->each([&](Row v, int r, int) {
      if (work.dropped == nullptr) v = Row::mul(v, scale(r));
      return Row::add(v, Row::broadcast(value_at(work.bias, row + r, n, 0.0f)));
    });
  store_transposed(block, work.y, strip * kStrip, work.tokens, row, n, rest);
}

void forward(const TileForward& work, int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel,
             float* sums) {
  const TileUnit unit;
  const int64_t depth = tiles_of(work.weight.columns);
  BlockSums block_sums, base_sums;
  Block block{block_sums.c, 0, 0}, base{base_sums.c, 0, 0};
  alignas(64) float rest[kBlockStrips * kStrip * kPanelStep];
  const bool apart = work.rest.first != nullptr;
  bf16* turned = panel + kPanelStep / kStrip * depth * kTile;
  // Up to kFewStrips strips of tokens are multiplied with W's rows in place, without a copy in the panel: after the
  // first strip the rows are in L2, and a copy would cost more.
  const bool as_they_lie = last - first <= kFewStrips && !apart && whole_tiles(work.weight, begin, end);
  const bool one_strip = last - first == 1 && !apart && decodes_rows(work.weight);
  const int64_t pairs = ceil_div(last - first, kBlockStrips);
  Ahead ahead;
  const auto run = [&](int64_t row, int64_t strip, int64_t from, int64_t tiles, const auto& rows) {
    block.right = static_cast<int>(min_i64(kBlockStrips, last - strip));
    block.left = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - row, kStrip)));
    if (tiles < depth)
      block.c =
          sums + carried_sums(strip - first, end - begin) + (row - begin) / (kBlockStrips * kStrip) * kBlockElements;
    forward_block(work, row, strip, from, tiles, rows, apart ? rest + (row - begin) : nullptr, &block, &base, &ahead);
  };
  if (one_strip) {
    for (int64_t row = begin; row < end; row += kBlockStrips * kStrip)
      run(row, first, 0, depth, decoded_rows(work.weight, row));
    return;
  }
  for (int64_t from = 0; from < depth; from += work.depth_part) {
    const int64_t tiles = min_i64(work.depth_part, depth - from), next = from + tiles;
    if (as_they_lie) {
      for (int64_t row = begin; row < end; row += kBlockStrips * kStrip)
        for (int64_t strip = first; strip < last; strip += kBlockStrips)
          run(row, strip, from, tiles,
              rows_of(work.weight.dense + row * work.weight.columns + from * kTileDepth, work.weight.columns));
      continue;
    }
    weight_rows(work.weight, begin, end, from, tiles, panel);
    if (apart) turn_rows(panel, ceil_div(end - begin, kStrip), tiles, turned);
    const int64_t steps = pairs * ceil_div(end - begin, kRowsOfStep) * tiles;
    ahead = next < depth
                ? rows_ahead(work.weight, begin, end - begin, next, min_i64(work.depth_part, depth - next), steps)
                : rows_ahead(work.weight, end, end - begin, 0, min_i64(work.depth_part, depth), steps);
    for (int64_t strip = first; strip < last; strip += kBlockStrips) {
      if (apart) dropped_product(work, end - begin, strip * kStrip, turned, rest);
      for (int64_t row = begin; row < end; row += kBlockStrips * kStrip)
        run(row, strip, from, tiles, Strips{panel + (row - begin) / kStrip * tiles * kTile, tiles * kTile});
    }
  }
}

}  // namespace
}  // namespace peft_ext
