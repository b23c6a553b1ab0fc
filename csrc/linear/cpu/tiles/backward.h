// Computes the backward for one panel of W's columns: dX = l ∘ (G W + mask/(1-p) ∘ (P A + H W)). Include this file
// after the target pragma (cpu/target_<isa>.h) and the files of an instruction set (see block.h). tiles.h defines G, H
// and P.
#pragma once

#include "linear/cpu/tiles/block.h"
#include "linear/cpu/tiles/panels.h"

namespace peft_ext {
namespace {

inline bool masks(const TileBackward& work) { return work.keep != nullptr && (work.rank > 0 || work.more != nullptr); }

// Adds P A + H W to the block. If there is a dropout mask, then multiplies the whole block, which must have been zero
// before the call, with the mask and 1/(1-p). P A is the low-rank part of dX, and H W is the product that only PEFT's
// DoRA with dropout on the base has (see tiles.h).
inline void add_masked(const TileBackward& work, int64_t column, int64_t strip, const Strips& lanes, Block* block) {
  const int64_t tiles = tiles_of(work.weight.rows), length = tiles * kTile;
  const int64_t token = strip * kStrip;
  if (work.rank > 0)
    add_low_rank(work.p + token * work.rank, work.a + column / kStrip * work.rank * kStrip, work.rank, block);
  if (work.more != nullptr)
    multiply(Strips{work.more + strip * length, length}, block->left, lanes, block->right, tiles, block->c);
  if (masks(work)) {
    const Row by = Row::broadcast(work.keep_scale);
    block->each([&](Row v, int r, int j) {
      if (token + r >= work.tokens) return v;
      const uint32_t word = work.keep[(token + r) * work.keep_words + (column + j * kStrip) / 32];
      return Row::where(word >> ((column + j * kStrip) % 32), Row::mul(v, by), Row::zero());
    });
  }
}

// Loads the values of grad_x, to which backward() adds the sums of dX, into `block`.
inline void load_sums(const TileBackward& work, int64_t column, int64_t token, Block* block) {
  block->each([&](Row v, int r, int j) {
    const int64_t k = work.weight.columns, at = column + j * kStrip;
    if (token + r >= work.tokens || at >= k) return v;
    return Row::load_as(work.grad_x + (token + r) * k + at, min_i64(kStrip, k - at));
  });
}

// The tiles of one layer that lie in a part of the depth: `tiles` tiles, from the layer's tile `from` on. panel: these
// tiles of W's columns, as right strips.
struct DepthPiece {
  int layer;
  int64_t from, tiles;
  const bf16* panel = nullptr;
  Ahead ahead{};
};

// Writes to `pieces` the pieces of which the part [begin, end) of the depth consists, and returns the number of pieces.
// The depth counts tiles, and consists of the depths of all layers, one after the other.
inline int depth_pieces(const TileBackward* works, int count, int64_t begin, int64_t end, DepthPiece* pieces) {
  int found = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t tiles = tiles_of(works[i].weight.rows), from = begin > 0 ? begin : 0, to = min_i64(end, tiles);
    if (from < to) pieces[found++] = DepthPiece{i, from, to - from};
    begin -= tiles;
    end -= tiles;
  }
  return found;
}

// Adds the products of one DepthPiece of a layer to the sums of a block of dX. offset: index of the block's first
// column in the panel. term: memory for a second block, in which the low-rank part is masked if `block` already holds
// sums of other layers or of grad_x.
inline void add_piece(const TileBackward* works, DepthPiece* piece, int64_t column, int64_t offset, int64_t strip,
                      Block* block, Block* term) {
  const TileBackward& work = works[piece->layer];
  const int64_t length = tiles_of(work.weight.rows) * kTile, own = piece->tiles * kTile;
  const Strips lanes{piece->panel + offset / kStrip * own, own};
  if (piece->from == 0) {
    if ((piece->layer > 0 || works[0].onto) && masks(work)) {
      term->left = block->left;
      term->right = block->right;
      term->clear();
      add_masked(work, column, strip, lanes, term);
      for (int at = 0; at < kBlockElements; at += kStrip)
        Row::add(Row::load(block->c + at), Row::load(term->c + at)).store(block->c + at);
    } else {
      add_masked(work, column, strip, lanes, block);
    }
  }
  multiply(Strips{work.grad + strip * length + piece->from * kTile, length}, block->left, lanes, block->right,
           piece->tiles, block->c, &piece->ahead);
}

// Computes a block of dX from the block's sums: computes the dropped elements by dot products if `given` is not null,
// adds to grad_in_scale and multiplies by in_scale if in_scale is not null, and writes the block to grad_x. columns: if
// `given` is not null, the transpose of W's columns from `column` on.
inline void finish_block(const TileBackward& work, int64_t column, int64_t strip, const bf16* columns, Block* block) {
  const int64_t k = work.weight.columns, token = strip * kStrip;
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
              bf16* panel, float* sums) {
  const TileUnit unit;
  const TileBackward& work = works[0];
  BlockSums block_sums, term_sums;
  Block block{block_sums.c, 0, 0}, term{term_sums.c, 0, 0};
  const int64_t pairs = ceil_div(end - begin, kBlockStrips * kStrip), strips = ceil_div(end - begin, kStrip);
  int64_t depth = 0;
  for (int i = 0; i < count; ++i) depth += tiles_of(works[i].weight.rows);
  for (int64_t from = 0; from < depth; from += work.depth_part) {
    const int64_t to = min_i64(depth, from + work.depth_part), next = to < depth ? to : 0;
    DepthPiece pieces[kMostLayers], later[kMostLayers];
    const int found = depth_pieces(works, count, from, to, pieces);
    const int found_later = depth_pieces(works, count, next, next + work.depth_part, later);
    bf16* at = panel;
    for (int i = 0; i < found; ++i) {
      DepthPiece& piece = pieces[i];
      weight_lanes(works[piece.layer].weight, begin, end, piece.from, piece.tiles, at);
      piece.panel = at;
      at += strips * piece.tiles * kTile;
      if (i < found_later)
        piece.ahead =
            columns_ahead(works[later[i].layer].weight, next > 0 ? begin : end, end - begin, later[i].from,
                          later[i].tiles, pairs * ceil_div((last - first) * kStrip, kRowsOfStep) * piece.tiles);
    }
    bf16* turned = at;
    if (work.given != nullptr) turn_lanes(panel, strips, depth, turned);
    for (int64_t strip = first; strip < last; strip += kBlockStrips) {
      block.left = static_cast<int>(min_i64(kBlockStrips, last - strip));
      for (int64_t column = begin; column < end; column += kBlockStrips * kStrip) {
        const int64_t offset = column - begin;
        block.right = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - column, kStrip)));
        if (work.depth_part < depth)
          block.c = sums + carried_sums(strip - first, end - begin) + offset / (kBlockStrips * kStrip) * kBlockElements;
        if (from == 0) {
          block.clear();
          if (work.onto) load_sums(work, column, strip * kStrip, &block);
        }
        for (int i = 0; i < found; ++i) add_piece(works, pieces + i, column, offset, strip, &block, &term);
        if (to == depth) finish_block(work, column, strip, turned + offset * depth * kTileDepth, &block);
      }
    }
  }
}

}  // namespace
}  // namespace peft_ext
