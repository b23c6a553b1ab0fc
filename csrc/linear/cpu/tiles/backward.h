// The backward for one panel of W's columns: dX = l ∘ (G W + mask/(1-p) ∘ (P A + H W)). Include this file after the
// target pragma and the files of an instruction set.
#pragma once

#include "linear/cpu/tiles/block.h"
#include "linear/cpu/tiles/panels.h"

namespace peft_ext {
namespace {

inline bool masks(const TileBackward& work) { return work.keep != nullptr && (work.rank > 0 || work.more != nullptr); }

// Adds P A + H W to the block, and then masks the whole block. With a mask the block must be zero before the call.
inline void add_masked(const TileBackward& work, int64_t column, int64_t strip, const bf16* lanes, Block* block) {
  const int64_t tiles = tiles_of(work.weight.rows), length = tiles * kTile;
  const int64_t token = strip * kStrip;
  if (work.rank > 0)
    add_low_rank(work.p + token * work.rank, work.a + column / kStrip * work.rank * kStrip, work.rank, block);
  if (work.more != nullptr) multiply(work.more + strip * length, block->left, lanes, block->right, tiles, block->c);
  if (masks(work)) {
    const Row by = Row::broadcast(work.keep_scale);
    block->each([&](Row v, int r, int j) {
      if (token + r >= work.tokens) return v;
      const uint32_t word = work.keep[(token + r) * work.keep_words + (column + j * kStrip) / 32];
      return Row::where(word >> ((column + j * kStrip) % 32), Row::mul(v, by), Row::zero());
    });
  }
}

// Loads the present values of dX into the block.
inline void load_sums(const TileBackward& work, int64_t column, int64_t token, Block* block) {
  block->each([&](Row v, int r, int j) {
    const int64_t k = work.weight.columns, at = column + j * kStrip;
    if (token + r >= work.tokens || at >= k) return v;
    return Row::load_as(work.grad_x + (token + r) * k + at, min_i64(kStrip, k - at));
  });
}

// Computes a block of the sum of dX of `count` layers. lanes: W's columns as right strips, for each layer. columns:
// with `given`, W's columns from `column` on, as rows. term: memory for one more block.
inline void backward_block(const TileBackward* works, int count, int64_t column, int64_t strip,
                           const bf16* const* lanes, const bf16* columns, Block* block, Block* term, Ahead* ahead) {
  const TileBackward& work = works[0];
  const int64_t k = work.weight.columns, token = strip * kStrip;
  block->clear();
  if (work.onto) load_sums(work, column, token, block);
  for (int i = 0; i < count; ++i) {
    const int64_t tiles = tiles_of(works[i].weight.rows);
    if ((i > 0 || work.onto) && masks(works[i])) {
      term->left = block->left;
      term->right = block->right;
      term->clear();
      add_masked(works[i], column, strip, lanes[i], term);
      for (int at = 0; at < kBlockElements; at += kStrip)
        Row::add(Row::load(block->c + at), Row::load(term->c + at)).store(block->c + at);
    } else {
      add_masked(works[i], column, strip, lanes[i], block);
    }
    multiply(works[i].grad + strip * tiles * kTile, block->left, lanes[i], block->right, tiles, block->c, ahead + i);
  }
  if (work.given != nullptr) dropped_dots(work, column, strip, columns, block);
  if (work.in_scale != nullptr) {
    float* sums = work.grad_in_scale + token / kReduceTokens * k;
    block->each([&](Row v, int r, int j) {
      const int64_t at = column + j * kStrip, count = min_i64(kStrip, k - at);
      if (token + r >= work.tokens || count <= 0) return v;
      const Row x = Row::load_as(work.x + (token + r) * k + at, count);
      Row::fma(x, v, Row::load_as(sums + at, count)).store_as(sums + at, count);
      return Row::mul(v, Row::load_as(work.in_scale + at, count));
    });
  }
  for (int i = 0; i < block->left; ++i)
    for (int64_t r = 0; r < min_i64(kStrip, work.tokens - token - i * kStrip); ++r) {
      const Row one = Row::load(block->part(i, 0) + r * kStrip);
      const Row two = block->right > 1 ? Row::load(block->part(i, 1) + r * kStrip) : Row::zero();
      store_row(work.grad_x + (token + i * kStrip + r) * k + column, one, two, min_i64(k - column, 2 * kStrip));
    }
}

void backward(const TileBackward* works, int count, int64_t begin, int64_t end, int64_t first, int64_t last,
              bf16* panel) {
  const TileUnit unit;
  Block block, term;
  const int64_t pairs = ceil_div(end - begin, kBlockStrips * kStrip);
  const bf16* panels[kMostLayers];
  const bf16* lanes[kMostLayers];
  Ahead ahead[kMostLayers];
  for (int i = 0; i < count; ++i) {
    const TileWeight& weight = works[i].weight;
    const int64_t tiles = tiles_of(weight.rows);
    weight_lanes(weight, begin, end, panel);
    panels[i] = panel;
    panel += ceil_div(end - begin, kStrip) * tiles * kTile;
    ahead[i] = columns_ahead(weight, end, pairs * ceil_div((last - first) * kStrip, kRowsOfStep) * tiles);
  }
  const int64_t depth = tiles_of(works[0].weight.rows) * kTileDepth;
  bf16* turned = panel;
  if (works[0].given != nullptr) turn_lanes(panels[0], ceil_div(end - begin, kStrip), depth / kTileDepth, turned);
  for (int64_t strip = first; strip < last; strip += kBlockStrips) {
    block.left = static_cast<int>(min_i64(kBlockStrips, last - strip));
    for (int64_t column = begin; column < end; column += kBlockStrips * kStrip) {
      block.right = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - column, kStrip)));
      for (int i = 0; i < count; ++i)
        lanes[i] = panels[i] + (column - begin) / kStrip * tiles_of(works[i].weight.rows) * kTile;
      backward_block(works, count, column, strip, lanes, turned + (column - begin) * depth, &block, &term, ahead);
    }
  }
}

}  // namespace
}  // namespace peft_ext
