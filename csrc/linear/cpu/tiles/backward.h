// dX of one panel of W's columns. Included after the target pragma and the microkernel's file.
#pragma once

#include "linear/cpu/tiles/block.h"
#include "linear/cpu/tiles/decode.h"
#include "linear/cpu/tiles/dropped.h"

namespace peft_ext {
namespace {

inline bool masks(const TileBackward& work) { return work.keep != nullptr && (work.rank > 0 || work.more != nullptr); }

// block += P A + H W; the whole block is masked then, and has to be clear before, where the layer has a mask.
inline void add_masked(const TileBackward& work, int64_t column, int64_t strip, const bf16* lanes, Block* block) {
  const int64_t tiles = tiles_of(work.weight.rows), length = tiles * kTile;
  const int64_t token = strip * kStrip;
  if (work.rank > 0)
    add_low_rank(work.p + token * work.rank, work.a + column / kStrip * work.rank * kStrip, work.rank, block);
  if (work.more != nullptr) multiply(work.more + strip * length, block->left, lanes, block->right, tiles, block->c);
  if (masks(work)) {
    const __m512 by = _mm512_set1_ps(work.keep_scale);
    block->each([&](__m512 v, int r, int j) {
      if (token + r >= work.tokens) return v;
      const uint32_t word = work.keep[(token + r) * work.keep_words + (column + j * kStrip) / 32];
      const auto bits = static_cast<__mmask16>(word >> ((column + j * kStrip) % 32));
      return _mm512_maskz_mul_ps(bits, v, by);
    });
  }
}

// The block as it is in dX.
inline void load_sums(const TileBackward& work, int64_t column, int64_t token, Block* block) {
  block->each([&](__m512 v, int r, int j) {
    const int64_t k = work.weight.columns, at = column + j * kStrip;
    if (token + r >= work.tokens || at >= k) return v;
    const auto inside = static_cast<__mmask16>(k - at >= kStrip ? 0xffff : (1u << (k - at)) - 1);
    const __m256i words = _mm256_maskz_loadu_epi16(inside, work.grad_x + (token + r) * k + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  });
}

// dX of `count` layers, each with the lanes of its W; columns: with `given`, W's columns from `column` on; term: room.
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
        _mm512_store_ps(block->c + at, _mm512_add_ps(_mm512_load_ps(block->c + at), _mm512_load_ps(term->c + at)));
    } else {
      add_masked(works[i], column, strip, lanes[i], block);
    }
    multiply(works[i].grad + strip * tiles * kTile, block->left, lanes[i], block->right, tiles, block->c, ahead + i);
  }
  if (work.given != nullptr) dropped_dots(work, column, strip, columns, block);
  if (work.in_scale != nullptr) {
    float* sums = work.grad_in_scale + token / kReduceTokens * k;
    block->each([&](__m512 v, int r, int j) {
      const int64_t at = column + j * kStrip;
      if (token + r >= work.tokens || at >= k) return v;
      const auto inside = static_cast<__mmask16>(k - at >= kStrip ? 0xffff : (1u << (k - at)) - 1);
      const __m256i words = _mm256_maskz_loadu_epi16(inside, work.x + (token + r) * k + at);
      const __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
      const __m512 sum = _mm512_fmadd_ps(x, v, _mm512_maskz_loadu_ps(inside, sums + at));
      _mm512_mask_storeu_ps(sums + at, inside, sum);
      return _mm512_mul_ps(v, _mm512_maskz_loadu_ps(inside, work.in_scale + at));
    });
  }
  for (int i = 0; i < block->left; ++i)
    for (int64_t r = 0; r < min_i64(kStrip, work.tokens - token - i * kStrip); ++r) {
      const __m512 one = _mm512_load_ps(block->part(i, 0) + r * kStrip);
      const __m512 two = block->right > 1 ? _mm512_load_ps(block->part(i, 1) + r * kStrip) : _mm512_setzero_ps();
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
