// Runs the tile kernels on all threads, decides which weights and tokens the tile kernels accept, and makes strips of
// activations.
#pragma once

#include "linear/cpu/passes.h"
#include <vector>

#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "linear/cpu/tiles/plan.h"
#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {

// Returns the tile kernels of the current CPU path, or null if the path has none.
const TileKernels* tile_kernels();

enum class TileProduct {
  kForward,
  kBackward,
  kPlainBackward  // a backward whose product dY W PyTorch can also add in place to the low-rank part of dX
};

// Returns whether the tile kernels accept `tokens` tokens of dtype `type` for the weight.
bool tiles_accept(const FrozenWeight& weight, ScalarType type, int64_t tokens, TileProduct product);

// Returns whether TileKernels::few_tokens multiplies a dense weight with an x of dtype `type` that has too few tokens
// for TileKernels::forward.
bool tiles_take_few_tokens(ScalarType type);

// Returns each weight, in the order of `weights`, as an argument of the tile kernels. The decoded scales of NF4 weights
// with double quantization are in the calling thread's scratch memory.
std::vector<TileWeight> tile_weights(const std::vector<const FrozenWeight*>& weights);

// strips_of returns the arguments of TileKernels::left_strips and right_strips. strips_room returns scratch memory of
// the calling thread for the strips.
TokenStrips strips_of(bf16* room, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                      const KeepBits* keep);
bf16* strips_room(Scratch use, int64_t tokens, int64_t depth);

// Converts m [tokens, depth] to left strips if `left` is true, and otherwise to right strips. The strips are written to
// `room`, which must have room for strips_elements(tokens, depth) elements, or to the calling thread's scratch memory
// for `use`.
bf16* token_strips(bf16* room, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep);
bf16* token_strips(Scratch use, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep);

// Returns whether the tile kernels multiply the dropped elements separately. On AMX, tiles_take_dropped returns false,
// because AMX multiplies all of W in about the time in which vector instructions multiply a twentieth of W.
bool tiles_take_dropped(const Dropout& dropout, int64_t depth);

// DroppedTokens holds the elements of m [tokens, depth] that dropout drops. The pointers in `entries` point into
// `first` and `held`.
struct DroppedTokens {
  std::vector<int64_t> first;
  Tensor held;  // memory of the 32-bit entries, allocated as a float32 tensor
  DroppedEntries entries;
};
DroppedTokens dropped_tokens_of(const Tensor& m, int64_t tokens, int64_t depth, const KeepBits& keep);

// Returns the calling thread's scratch for a panel of W with `elements` elements.
bf16* panel_scratch(int64_t elements);

// Divides all panels of W and all token strips into the ranges of a plan, and calls run(begin, end, first, last, panel,
// sums) for each range, on all threads: [begin, end) are rows of W (in the backward, columns of W), [first, last) are
// token strips, and panel and sums are the thread's scratch memory. strip_step: number of token strips in a unit of the
// plan (see plan.h). part: number of tiles in a part of the depth; `cut` says how the depth is cut into parts (see
// DepthCut). turns: whether the scratch of a panel also holds the transpose of the panel.
template <typename Run>
void run_panels(int64_t count, int64_t depth, int64_t tokens, int64_t strip_step, const DepthCut& cut, int64_t part,
                bool turns, const Run& run) {
  static_assert(kPlanRows == kPanelStep && kPlanStrip == kStrip && kPlanTile == kTileDepth);
  const TilePlan plan = plan_tiles(count, depth, tokens, strip_step, tile_kernels()->decode_strips, loop_threads(),
                                   turns ? 1 : panels_together(cut, part));
  const int64_t panel = (turns ? 2 : 1) * plan.together * strips_elements(kPanelStep, part * kTileDepth);
  const int64_t sums = part * kTileDepth < depth ? carried_sums(plan.strips_together(), plan.together * kPanelStep) : 0;
  parallel_for(0, plan.parts, 1, [&](int64_t begin, int64_t end) {
    bf16* room = panel_scratch(panel + sums * static_cast<int64_t>(sizeof(float) / sizeof(bf16)));
    auto* sums_room = reinterpret_cast<float*>(room + panel);
    for (int64_t share = begin; share < end; ++share)
      plan.each(share, [&](const PlanRange& of) { run(of.row, of.end, of.first, of.last, room, sums_room); });
  });
}

}  // namespace peft_ext
