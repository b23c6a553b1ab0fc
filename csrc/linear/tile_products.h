// The tile kernels on all threads: which weights and tokens they take, strips of activations, and the rank's products.
#pragma once

#include <algorithm>

#include "linear/passes.h"
#include "linear/scratch.h"
#include "linear/tiles.h"

namespace peft_ext {

// Null where the CPU path in use has none.
const TileKernels* tile_kernels();

// Below this TileFewTokens serves over a dense weight, which the tiles would copy into panels for one strip or two.
constexpr int64_t kDenseTileTokens = 33;

// Whether the tiles take this many tokens of this type against the weight.
bool tiles_take(const FrozenWeight& weight, ScalarType type, int64_t tokens, bool forward);

TileWeight tile_weight(const FrozenWeight& weight);

// [tokens, depth] as strips, into a scratch of the calling thread.
bf16* token_strips(Scratch use, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep);

// Of a panel of W, of the calling thread.
bf16* panel_scratch(int64_t depth);

// Bytes of the tokens' strips that all panels pass over before the next tokens: they stay in L3.
constexpr int64_t kTokenBlockBytes = int64_t{4} << 20;

// run(begin, end, first strip, last strip, panel) over panels of W by blocks of token strips, over all threads.
// strip_step: strips that stay together.
template <typename Run>
void run_panels(int64_t count, int64_t depth, int64_t tokens, int64_t strip_step, const Run& run) {
  const int64_t threads = torch::stable::get_num_threads(), strips = ceil_div(tokens, kStrip);
  const int64_t panels = ceil_div(count, kPanelStep);
  const int64_t fitting = std::max<int64_t>(1, kTokenBlockBytes / (strips_elements(kStrip, depth) * 2));
  int64_t together = round_up(min_i64(strips, fitting), strip_step);
  const auto balanced = [&](int64_t tasks) { return ceil_div(tasks, threads) * threads * 32 <= tasks * 33; };
  const auto pass = [&](int64_t panel, int64_t strip, bf16* room) {
    const int64_t row = panel * kPanelStep;
    run(row, min_i64(row + kPanelStep, count), strip, min_i64(strip + together, strips), room);
  };
  if (balanced(panels)) {  // all threads pass over the same tokens, each with panels of its own
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      bf16* room = panel_scratch(depth);
      for (int64_t strip = 0; strip < strips; strip += together)
        for (int64_t panel = begin; panel < end; ++panel) pass(panel, strip, room);
    });
    return;
  }
  // The fewest blocks, each of which decodes all panels again, that leave no thread idle for more than 1/32 of the
  // time.
  int64_t blocks = ceil_div(strips, together);
  while (!balanced(panels * blocks) && together > 4 * strip_step) {
    together = round_up(ceil_div(strips, blocks + 1), strip_step);
    blocks = ceil_div(strips, together);
  }
  torch::stable::parallel_for(0, panels * blocks, 1, [&](int64_t begin, int64_t end) {
    bf16* room = panel_scratch(depth);
    for (int64_t i = begin; i < end; ++i) pass(i % panels, i / panels * together, room);
  });
}

// Whether the rank's own products run on the tiles: where a tile's product is so much faster than a vector's.
bool ranks_on_tiles();

// Activations [rows, columns] and what dropout keeps of them, as tiles take W.
TileWeight tile_tokens(const Tensor& m, int64_t rows, int64_t columns, const KeepBits* keep);

// The terms of a product's two sides, set side by side over the depth so that one product sums them: hi hi + hi lo +
// lo hi, 16 bits of each. m [rows, stride], its first `rank` columns -> [rows, 3 rank].
Tensor split_depth(const float* m, int64_t rows, int64_t rank, int64_t stride, bool left);

// A matrix of bfloat16 [count, depth] as strips, in a tensor of its own.
Tensor strips_tensor(const Tensor& m, int64_t count, int64_t depth, bool left);

// m a [rows, padded rank], where a [columns, padded] float32.
void tile_shrink(const TileWeight& m, const Tensor& a, int terms, float scale, float* out, float* squares);

// mᵀ left [columns, padded rank], where left [rows, padded] float32.
Tensor tile_outer(const TileWeight& m, const float* left, int64_t padded, float scale);

}  // namespace peft_ext
