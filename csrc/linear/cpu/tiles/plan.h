// Divides the work of the tile kernels among threads. The plan is pure arithmetic without torch and without a search,
// so that planning ends for every input.
//
//   unit:    The product of a panel of kPlanRows rows of W with kPlanStrip * step tokens, which one thread computes.
//   block:   Token strips that are multiplied with all of W before the strips of the next block. The token strips of a
//            block stay in L3.
//   part:    The work of one thread: a range of units in each block, panel after panel.
//
// Every unit is in exactly one range, and so in exactly one part. There are two divisions: in the first division, a
// range may end at any unit, and two threads may decode the same panel; in the second division, a range ends only at a
// whole panel. The plan uses the division whose busiest thread has the smaller cost. The unit of cost is the product of
// one panel with one strip of tokens; decoding a panel costs `decode` of these products. In each block, the cost of the
// most expensive part is at most the mean cost of a part, plus the cost of one unit, plus the cost of decoding two
// panels.
#pragma once

#include <stdint.h>

namespace peft_ext {

constexpr int64_t kPlanRows = 64;   // number of rows (or columns) of W in a panel
constexpr int64_t kPlanStrip = 16;  // number of tokens in a strip

constexpr int64_t kPlanTile = 32;  // number of elements of the depth in a tile
// Largest number of bytes in a block's token strips, which stay in L3 while all panels use the strips. Blocks are
// larger if kPlanUnits requires larger blocks, or if one unit alone is larger. A depth above kPlanDeep counts as
// kPlanDeep, because with smaller blocks, of fewer tokens, W would be decoded more often.
constexpr int64_t kPlanBlockBytes = int64_t{4} << 20;
constexpr int64_t kPlanDeep = 4096;

// A DepthCut says how the depth of a product is cut into parts. The depths in a DepthCut count elements, not tiles. The
// depths of the panels that are decoded together add up to at most kPlanPanel elements, so that the panels take at most
// 512 KiB of L2, unless a single panel whose depth is not cut is deeper. If several panels are decoded together, each
// load of the tokens, which a deep layer reads from L3 or from memory, is used for all of these panels. If the depth is
// not cut, no sums are loaded and stored between parts.
struct DepthCut {
  int64_t whole;     // largest depth that is not cut into parts
  int64_t part;      // largest number of elements in a part of a deeper depth
  int64_t together;  // largest number of panels that are decoded together
};
constexpr int64_t kPlanPanel = 4096;
constexpr DepthCut kForwardCut{kPlanPanel, 1024, 4};
// A panel of the backward has a few columns of many rows of W, so that it consists of many short runs of memory. Most
// of the runs lie in different pages, and if the length of a row is a multiple of a large power of two, the runs share
// few sets of a cache. Parts of the depth with few rows, and panels with many columns, have longer runs of memory in
// fewer pages.
constexpr DepthCut kBackwardCut{kPlanPanel, 512, 8};
// If there are several blocks, the largest block that is allowed has kPlanUnits units or more for each thread. Blocks
// are equally large, so that a thread may have only about half of kPlanUnits units in a block. With kPlanUnits units
// for each thread, it costs little if a thread has one unit more than the other threads.
constexpr int64_t kPlanUnits = 32;

// The rows [row, end) of W, which are multiplied with the token strips [first, last).
struct PlanRange {
  int64_t row, end, first, last;
};

struct TilePlan {
  int64_t rows, strips;           // numbers of rows of W and of token strips in the call
  int64_t step;                   // number of token strips in a unit
  int64_t panels, steps, blocks;  // `steps` is the number of groups of `step` strips; the last group may be shorter
  int64_t parts;                  // number of parts, at most the number of threads; 0 if there are no units
  bool whole_panels;              // whether all units of a panel in a block belong to the same part
  int64_t together;               // largest number of panels of W in a range

  // Returns the largest number of token strips in a PlanRange.
  int64_t strips_together() const { return blocks > 0 ? (steps + blocks - 1) / blocks * step : 0; }

  int64_t first_step(int64_t block) const { return steps * block / blocks; }

  // Returns the index of the first unit of a part in a block. The units of a block are counted panel by panel.
  int64_t first_unit(int64_t part, int64_t block) const {
    const int64_t of_panel = first_step(block + 1) - first_step(block);
    return whole_panels ? panels * part / parts * of_panel : panels * of_panel * part / parts;
  }

  // Calls run(PlanRange) for all ranges of a part, block after block. A range is a piece of a panel, or up to
  // `together` whole panels.
  template <typename Run>
  void each(int64_t part, const Run& run) const {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t base = first_step(block), of_panel = first_step(block + 1) - base;
      const int64_t end = first_unit(part + 1, block);
      int64_t piece = 0;
      for (int64_t unit = first_unit(part, block); unit < end; unit += piece) {
        const int64_t panel = unit / of_panel, at = unit % of_panel;
        piece = end - unit < of_panel - at ? end - unit : of_panel - at;
        const int64_t last = (base + at + piece) * step;
        int64_t taken = 1;
        for (; taken < together && piece == taken * of_panel && end - unit - piece >= of_panel; ++taken)
          piece += of_panel;
        const int64_t row = panel * kPlanRows, stop = row + taken * kPlanRows;
        run(PlanRange{row, stop < rows ? stop : rows, (base + at) * step, last < strips ? last : strips});
      }
    }
  }
};

// Returns the number of tiles in a part of a depth of `tiles` tiles: all tiles, or a multiple of 8. A depth above
// DepthCut::whole is cut into parts of equal length, of which only the last may be shorter.
inline int64_t depth_part(const DepthCut& cut, int64_t tiles) {
  const int64_t most = cut.part / kPlanTile;
  if (tiles <= cut.whole / kPlanTile) return tiles;
  const int64_t parts = (tiles + most - 1) / most;
  return ((tiles + parts - 1) / parts + 7) / 8 * 8;
}

// Returns the largest number of panels that are decoded together, if a part of the depth has `tiles` tiles.
inline int64_t panels_together(const DepthCut& cut, int64_t tiles) {
  const int64_t fitting = kPlanPanel / kPlanTile / (tiles > 1 ? tiles : 1);
  return fitting < 1 ? 1 : fitting < cut.together ? fitting : cut.together;
}

// Plans the product of W [rows, depth], or of the transpose of W, with `tokens` tokens. decode: the cost of decoding a
// panel; the unit is the product of the panel with one strip of tokens. together: largest number of panels in a range.
inline TilePlan plan_tiles(int64_t rows, int64_t depth, int64_t tokens, int64_t step, int64_t decode, int64_t threads,
                           int64_t together = 1) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto most = [](int64_t a, int64_t b) { return a > b ? a : b; };
  TilePlan plan{rows, ceil(tokens, kPlanStrip), step, ceil(rows, kPlanRows), 0, 1, 0, false, 1};
  plan.steps = ceil(plan.strips, step);
  if (plan.panels == 0 || plan.steps == 0) return plan;
  const int64_t read = depth < kPlanDeep ? ceil(depth, kPlanTile) * kPlanTile : kPlanDeep;
  const int64_t step_bytes = most(1, read) * kPlanStrip * 2 * step;
  const int64_t fitting = most(1, kPlanBlockBytes / step_bytes);
  plan.blocks = ceil(plan.steps, most(fitting, ceil(kPlanUnits * threads, plan.panels)));
  // The costs of the two divisions are computed for the largest block. Each other block has as many steps as the
  // largest block, or one step fewer.
  const int64_t of_panel = ceil(plan.steps, plan.blocks), units = plan.panels * of_panel;
  plan.parts = units < threads ? units : threads;
  const int64_t each = ceil(units, plan.parts), touched = (each - 1 + of_panel - 1) / of_panel + 1;
  const int64_t cut = each * step + (touched < plan.panels ? touched : plan.panels) * decode;
  const int64_t whole = ceil(plan.panels, plan.parts) * (of_panel * step + decode);
  plan.whole_panels = whole <= cut;
  if (plan.whole_panels && plan.panels < plan.parts) plan.parts = plan.panels;
  const int64_t held = plan.whole_panels ? ceil(plan.panels, plan.parts) : most(1, each / of_panel);
  plan.together = together < held ? together : held;
  return plan;
}

}  // namespace peft_ext
