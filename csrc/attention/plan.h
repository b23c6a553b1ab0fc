// Divides the work of attention on the CPU among threads. This file does not depend on torch, so that
// tests/native/attention_plan.cpp can test it alone. Every plan adds the terms of a sum in the same order, so that the
// bits of the results are equal for every number of threads.
//
// Forward. A unit is a block of 64 queries of one head; under a causal mask, later blocks of queries see more keys and
// cost more. A part is the work of one thread. Each part of the forward gets an equal number of whole heads that are
// neighbours in memory, because threads that write to one page of new memory wait for each other. The remaining heads
// are divided among teams, which are groups of parts. The units of a team are sorted by falling cost and dealt to the
// parts of the team in turn, forwards in one turn and backwards in the next turn, so that each part gets expensive and
// cheap units.
//
// Backward. A stream is a sequence of heads whose dK and dV are added up in the same memory. The plan divides a head's
// matrix [queries, keys] into cells of `step` by `step` blocks of 64. A cell adds to dQ of its queries (a row of the
// matrix of cells), and to dK and dV of its keys (a column). A diagonal is the set of cells of one head with the same
// difference of row and column: the cells of a diagonal share no row and no column, and can run at the same time. The
// diagonals run in the order of a falling difference. Therefore, for every `step`, the cells of a row add to dQ from
// the first column to the last, and the cells of a column add to dK and dV from the last row to the first.
//
// A group is a set of at_once streams, whose sums of dQ are in memory at the same time. A phase is the cells of one
// diagonal of one head in all streams of a group. A region is a set of cells that the threads compute without a barrier
// between the cells; a barrier follows the region. A region consists of cells of one phase, and then of cells of the
// next phase in streams whose cells of the first phase are all done in earlier regions. Where possible, the number of
// cells of a region is a multiple of the number of threads.
//
// plan_backward estimates the time of a plan for several values of `step`, and takes the `step` with the smallest time.
// If `step` covers the whole matrix of a head, the head is one cell.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

#include "attention/kernels.h"

namespace peft_ext {

// kBlockCost, kTurnCost and kRegionCost are in sixteenths of the cost of a block of 64 queries by 64 keys.
constexpr int64_t kBlockCost = 16;
constexpr int64_t kTurnCost = 2;    // cost of converting a block of 64 queries to operands, once in each cell
constexpr int64_t kRegionCost = 4;  // cost of starting the threads of a region and waiting for the last thread

// Largest number of cells in a row or in a column of a head's matrix. The limit bounds the time that planning takes.
constexpr int64_t kMostCells = 256;

struct ForwardPlan {
  int64_t heads, blocks;  // number of query heads of all batches; number of blocks of queries of a head
  int64_t parts;          // number of parts of the work, at most the number of threads

  // Returns the units of a part, head after head, so that a thread reads the keys of one head at a time. The blocks of
  // a head are in falling order, so that under a causal mask the cheapest block is the last.
  std::vector<ForwardUnit> units(int64_t part) const {
    std::vector<ForwardUnit> found;
    const int64_t whole = heads / parts, rest = heads % parts;
    for (int64_t head = part * whole; head < (part + 1) * whole; ++head)
      for (int64_t block = blocks - 1; block >= 0; --block) found.push_back({head, block});
    if (rest == 0) return found;
    const int64_t teams = std::gcd(rest, parts), members = parts / teams, shared = rest / teams;
    const int64_t first = parts * whole + part / members * shared, member = part % members;
    const auto dealt = static_cast<std::ptrdiff_t>(found.size());
    for (int64_t turn = 0; turn * members < shared * blocks; ++turn) {
      const int64_t rank = turn * members + (turn % 2 == 0 ? member : members - 1 - member);
      if (rank < shared * blocks) found.push_back({first + rank % shared, blocks - 1 - rank / shared});
    }
    std::stable_sort(found.begin() + dealt, found.end(),
                     [](const ForwardUnit& a, const ForwardUnit& b) { return a.head < b.head; });
    return found;
  }
};

inline ForwardPlan plan_forward(int64_t heads, int64_t queries, int64_t threads) {
  const int64_t blocks = (queries + kPlanBlock - 1) / kPlanBlock;
  return {heads, blocks, std::min(std::max<int64_t>(threads, 1), heads * blocks)};
}

// A region: the cells [begin, begin + count) of a phase, and the cells [0, next) of the next phase.
struct BackwardRegion {
  int64_t phase, begin, count, next;
  int64_t cells() const { return count + next; }
};

struct BackwardPlan {
  int64_t streams, heads;            // number of streams, and number of heads of each stream
  int64_t query_blocks, key_blocks;  // numbers of blocks of queries and of keys of a head
  bool causal;
  int64_t threads;
  int64_t at_once;        // number of streams whose dQ is in memory at the same time
  int64_t step;           // number of blocks along a side of a cell
  int64_t rows, columns;  // numbers of rows and columns of cells of a head

  bool whole() const { return rows == 1 && columns == 1; }
  int64_t diagonals() const { return rows + (causal ? 0 : columns - 1); }
  // Returns the number of a head's blocks of keys that are part of some cell.
  int64_t reached() const {
    if (streams == 0) return 0;
    return causal ? std::min(key_blocks, rows * step) : key_blocks;
  }
  int64_t groups() const { return (streams + at_once - 1) / at_once; }
  int64_t phases() const { return groups() * heads * diagonals(); }
  int64_t group_of(int64_t phase) const { return phase / (heads * diagonals()); }
  // Returns the row minus the column of the cells of a phase.
  int64_t difference(int64_t phase) const { return rows - 1 - phase % diagonals(); }

  // Returns the number of cells that a phase has in each stream of the phase's group.
  int64_t width(int64_t phase) const {
    const int64_t d = difference(phase);
    return std::min(rows, columns + d) - std::max<int64_t>(0, d);
  }
  int64_t streams_of(int64_t phase) const { return std::min(at_once, streams - group_of(phase) * at_once); }

  // Returns the cost of the largest cell of a phase.
  int64_t cell_cost(int64_t phase) const {
    const int64_t high = std::min(step, query_blocks), wide = std::min(step, key_blocks);
    const int64_t side = std::min(high, wide);
    const bool half = causal && difference(phase) == 0;
    const int64_t blocks = half ? side * (side + 1) / 2 + (high - side) * wide : high * wide;
    return blocks * kBlockCost + high * kTurnCost;
  }

  // Sets `region` to the region that begins with the cell `begin` of `phase`, and then `phase` and `begin` to the first
  // cell after the region. Returns false if no cell is left.
  bool take(int64_t* phase, int64_t* begin, BackwardRegion* region) const {
    if (*phase >= phases()) return false;
    const int64_t rest = streams_of(*phase) * width(*phase) - *begin;
    const bool more = *phase + 1 < phases();
    // The cells of the phase from `begin` on belong to stream `before` of the group and later streams.
    const int64_t before = *begin / width(*phase);
    const int64_t next = more ? std::min(before, streams_of(*phase + 1)) * width(*phase + 1) : 0;
    const int64_t all = rest + next, cells = all < threads ? all : all / threads * threads;
    *region = {*phase, *begin, std::min(rest, cells), std::max<int64_t>(0, cells - rest)};
    *begin += cells;
    if (cells >= rest) {
      ++*phase;
      *begin = cells - rest;
      // If the next phase is of the last group, which may have fewer streams, the region may contain all cells of the
      // next phase.
      if (*phase < phases() && *begin == streams_of(*phase) * width(*phase)) {
        ++*phase;
        *begin = 0;
      }
    }
    return true;
  }

  // Calls run(region) for the regions in their order.
  template <typename Run>
  void each_region(const Run& run) const {
    int64_t phase = 0, begin = 0;
    for (BackwardRegion region; take(&phase, &begin, &region);) run(region);
  }

  int64_t parts(const BackwardRegion& region) const { return std::min(threads, region.cells()); }

  // Returns the index in the region of the first cell of part `part`. The cells of a region are divided into
  // parts(region) parts of nearly equal costs, which run at the same time.
  int64_t first_cell(const BackwardRegion& region, int64_t part) const {
    const int64_t all = parts(region);
    if (region.next == 0) return region.count * part / all;
    const int64_t cost = cell_cost(region.phase), next_cost = cell_cost(region.phase + 1);
    const int64_t at = (region.count * cost + region.next * next_cost) * part / all, of_phase = region.count * cost;
    if (at < of_phase) return at / cost;
    return region.count + (at - of_phase) / next_cost;
  }

  BackwardCell cell(const BackwardRegion& region, int64_t index) const {
    const bool next = index >= region.count;
    const int64_t phase = region.phase + next, at = next ? index - region.count : region.begin + index;
    const int64_t d = difference(phase), slot = at / width(phase);
    const int64_t row = std::max<int64_t>(0, d) + at % width(phase), column = row - d;
    BackwardCell found;
    found.slot = slot;
    found.stream = group_of(phase) * at_once + slot;
    found.head = phase / diagonals() % heads;
    found.query = row * step;
    found.query_end = std::min(query_blocks, found.query + step);
    found.key = column * step;
    found.key_end = std::min(key_blocks, found.key + step);
    found.first = column == 0;
    found.last = column == (causal ? std::min(row, columns - 1) : columns - 1);
    return found;
  }

  // Returns the estimated time of the plan: the sum over the regions of the cost of the busiest thread and kRegionCost.
  int64_t time() const {
    int64_t total = 0;
    each_region([&](const BackwardRegion& region) {
      const int64_t each = (region.cells() + threads - 1) / threads;
      int64_t cost = cell_cost(region.phase);
      if (region.next > 0) cost = std::max(cost, cell_cost(region.phase + 1));
      total += each * cost + kRegionCost;
    });
    return total;
  }
};

// Plans the backward of `streams` streams, each a sequence of `heads` heads (see the top of this file). If a head has
// more than one cell, at_once is the largest number of streams whose sums of dQ [queries, size] have at most
// most_floats floats, but at least 1.
inline BackwardPlan plan_backward(int64_t streams, int64_t heads, int64_t queries, int64_t keys, int64_t size,
                                  bool causal, int64_t threads, int64_t most_floats) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  BackwardPlan best{};
  best.streams = streams;
  best.heads = heads;
  best.query_blocks = ceil(queries, kPlanBlock);
  best.key_blocks = std::max<int64_t>(1, ceil(keys, kPlanBlock));  // without keys, a cell still writes dQ = 0
  best.causal = causal;
  best.threads = std::max<int64_t>(threads, 1);
  best.rows = best.columns = 1;
  const int64_t longest = std::max(best.query_blocks, best.key_blocks);
  best.step = longest;
  if (heads == 0 || queries == 0) best.streams = 0;
  best.at_once = std::max<int64_t>(1, best.streams);
  if (best.streams == 0 || best.threads == 1) return best;
  int64_t time = best.time();
  const int64_t of_stream = std::max<int64_t>(1, best.query_blocks * kPlanBlock * size);
  // The values of `step` that are tried after the whole matrix are 2, 6, 4, 12, 8, 24, 16 and so on. A value of `step`
  // is taken only if the estimated time of its plan is shorter than the time with each value that was tried before.
  const auto consider = [&](int64_t step) {
    if (step >= longest || ceil(longest, step) > kMostCells) return;
    BackwardPlan other = best;
    other.step = step;
    other.rows = ceil(best.query_blocks, step);
    other.columns = ceil(best.key_blocks, step);
    other.at_once = std::min(streams, std::max<int64_t>(1, most_floats / of_stream));
    if (const int64_t found = other.time(); found < time) {
      time = found;
      best = other;
    }
  };
  for (int64_t step = kLeastStep; step < longest; step *= 2) {
    consider(step);
    consider(3 * step);
  }
  return best;
}

}  // namespace peft_ext
