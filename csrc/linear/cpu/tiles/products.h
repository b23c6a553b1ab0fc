// The tile kernels on all threads: which weights and tokens they take and strips of activations.
#pragma once

#include "linear/cpu/passes.h"
#include <vector>

#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "linear/cpu/tiles/plan.h"
#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {

// Null where the CPU path in use has none.
const TileKernels* tile_kernels();

enum class TileProduct {
  kForward,
  kBackward,
  kPlainBackward  // whose product PyTorch's could be as well, added onto the low-rank term
};

// Whether the tiles accept this many tokens of this type against the weight.
bool tiles_accept(const FrozenWeight& weight, ScalarType type, int64_t tokens, TileProduct product);

// Whether TileFewTokens serves the tokens of a dense weight that the tiles do not accept.
bool tiles_take_few_tokens(ScalarType type);

// As the tiles take them, in order; what is decoded of their scales is in a scratch of the calling thread.
std::vector<TileWeight> tile_weights(const std::vector<const FrozenWeight*>& weights);

// [tokens, depth] as strips, into `room` for strips_elements(tokens, depth), or into a scratch of the calling thread.
bf16* token_strips(bf16* room, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep);
bf16* token_strips(Scratch use, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep);

// Whether the tiles make a product with dropped elements alone: not where they multiply with all of W in the time that
// a vector takes for a twentieth of it.
bool tiles_take_dropped(const Dropout& dropout, int64_t depth);

// The elements of m [tokens, depth] that are not kept; what it points to is in `held`.
struct DroppedTokens {
  std::vector<int64_t> first;
  Tensor held;  // int32 storage as float32
  DroppedEntries entries;
};
DroppedTokens dropped_tokens_of(const Tensor& m, int64_t tokens, int64_t depth, const KeepBits& keep);

// Of a panel of W with so many elements, of the calling thread.
bf16* panel_scratch(int64_t elements);

// run(begin, end, first strip, last strip, panel) over all panels of W and all token strips, over all threads.
// strip_step: strips that stay together. panel: elements that a panel takes.
template <typename Run>
void run_panels(int64_t count, int64_t depth, int64_t tokens, int64_t strip_step, int64_t panel, const Run& run) {
  static_assert(kPlanRows == kPanelStep && kPlanStrip == kStrip);
  const TilePlan plan = plan_tiles(count, depth, tokens, strip_step, tile_kernels()->decode_strips, loop_threads());
  parallel_for(0, plan.parts, 1, [&](int64_t begin, int64_t end) {
    bf16* room = panel_scratch(panel);
    for (int64_t part = begin; part < end; ++part)
      plan.each(part, [&](const PlanRange& of) { run(of.row, of.end, of.first, of.last, room); });
  });
}

}  // namespace peft_ext
