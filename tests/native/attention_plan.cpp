// Tests csrc/attention/plan.h by enumeration. The program has two uses:
//
//   attention_plan check THREADS
//       for 1..THREADS threads and the shapes below: tests that the forward deals each block of queries once; that the
//       backward has each pair of blocks that a query may see in one cell, in the order that plan.h states; that the
//       cells of a region share no queries and no keys of a stream; and that dQ is started and finished once
//   attention_plan share THREADS STREAMS HEADS QUERIES KEYS SIZE CAUSAL
//       prints "forward backward step regions useful": the busy shares of the threads, the side of a cell of the
//       backward in blocks, the number of regions of the backward, and the share that remains if the conversion of
//       operands and the start of the threads are counted as idle. STREAMS streams of HEADS heads are STREAMS x HEADS
//       query heads.
//
// The busy share is the sum of all costs, divided by the number of threads times the cost of the busiest thread; in the
// backward, the cost of the busiest thread is summed over the regions. The cost of a unit is its number of blocks of 64
// queries by 64 keys that a query may see, in sixteenths, plus kTurnCost for each block of queries.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "attention/plan.h"

using namespace peft_ext;

namespace {

constexpr int64_t kMostFloats = int64_t{1} << 25;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns the number of blocks of keys that the block of queries sees.
int64_t seen_blocks(int64_t query, int64_t key_blocks, bool causal) {
  return causal ? std::min(query + 1, key_blocks) : key_blocks;
}

struct Share {
  int64_t total = 0, busiest = 0;
  double of(int64_t threads) const {
    return static_cast<double>(total) / (static_cast<double>(threads) * static_cast<double>(busiest));
  }
};

// Returns the total cost of a forward's parts, and the cost of the busiest part. Sets `right` to false if a unit is not
// in exactly one part, does not exist, or is out of order.
Share forward_share(const ForwardPlan& plan, int64_t key_blocks, bool causal, bool* right) {
  Share share;
  std::vector<int> found(static_cast<size_t>(plan.heads * plan.blocks));
  for (int64_t part = 0; part < plan.parts; ++part) {
    int64_t cost = 0;
    ForwardUnit before{-1, 0};
    for (const ForwardUnit& unit : plan.units(part)) {
      *right = *right && unit.head >= 0 && unit.head < plan.heads && unit.block >= 0 && unit.block < plan.blocks;
      if (!*right) return share;
      // The units of a part come head after head and, within a head, from the last block of queries to the first.
      *right = *right && (unit.head > before.head || (unit.head == before.head && unit.block < before.block));
      before = unit;
      ++found[static_cast<size_t>(unit.head * plan.blocks + unit.block)];
      cost += seen_blocks(unit.block, key_blocks, causal) * kBlockCost + kTurnCost;
    }
    share.total += cost;
    share.busiest = std::max(share.busiest, cost);
  }
  for (const int times : found) *right = *right && times == 1;
  return share;
}

int64_t cost_of(const BackwardCell& cell, bool causal) {
  int64_t cost = 0;
  for (int64_t query = cell.query; query < cell.query_end; ++query)
    cost += std::max<int64_t>(0, std::min(cell.key_end, causal ? query + 1 : cell.key_end) - cell.key) * kBlockCost +
            kTurnCost;
  return cost;
}

struct Backward {
  Share share;
  int64_t regions = 0, useful = 0;
};

// Returns the number of regions of a backward, and the costs of its parts, summed over the regions.
Backward backward_share(const BackwardPlan& plan) {
  Backward found;
  plan.each_region([&](const BackwardRegion& region) {
    int64_t most = 0;
    for (int64_t part = 0; part < plan.parts(region); ++part) {
      int64_t cost = 0;
      for (int64_t at = plan.first_cell(region, part); at < plan.first_cell(region, part + 1); ++at)
        cost += cost_of(plan.cell(region, at), plan.causal);
      found.share.total += cost;
      most = std::max(most, cost);
    }
    found.share.busiest += most;
    ++found.regions;
  });
  for (int64_t query = 0; query < plan.query_blocks; ++query)
    found.useful += seen_blocks(query, plan.key_blocks, plan.causal) * kBlockCost * plan.streams * plan.heads;
  return found;
}

// Tests the cells of a backward. For each block of queries and each block of keys of a stream, the cells must come in
// the order that plan.h states.
bool check_backward(const BackwardPlan& plan) {
  struct Row {
    int64_t next_key = -1, region = -1;  // the next block of keys, from 0 to the last
    bool finished = false;
  };
  struct Column {
    int64_t head = -1, next_query = 0, region = -1;  // the next block of queries is next_query - 1
  };
  const int64_t queries = plan.query_blocks, keys = plan.key_blocks;
  std::vector<Row> rows(static_cast<size_t>(plan.streams * plan.heads * queries));
  std::vector<Column> columns(static_cast<size_t>(plan.streams * keys));
  std::vector<int64_t> owners(static_cast<size_t>(plan.at_once * queries), -1);  // the head in a slot's memory of dQ
  bool right = true;
  int64_t region_number = 0;
  plan.each_region([&](const BackwardRegion& region) {
    int64_t before = 0;
    for (int64_t part = 0; part <= plan.parts(region); ++part) {
      right = right && plan.first_cell(region, part) >= before;
      before = plan.first_cell(region, part);
    }
    right = right && plan.first_cell(region, 0) == 0 && before == region.cells() && region.cells() > 0;
    for (int64_t at = 0; right && at < region.cells(); ++at) {
      const BackwardCell cell = plan.cell(region, at);
      right = cell.stream >= 0 && cell.stream < plan.streams && cell.head >= 0 && cell.head < plan.heads &&
              cell.slot >= 0 && cell.slot < plan.at_once && cell.query >= 0 && cell.query < cell.query_end &&
              cell.query_end <= queries && cell.key >= 0 && cell.key < cell.key_end && cell.key_end <= keys;
      if (!right) return;
      const int64_t head = cell.stream * plan.heads + cell.head;
      for (int64_t query = cell.query; query < cell.query_end; ++query) {
        Row& row = rows[static_cast<size_t>(head * queries + query)];
        int64_t& owner = owners[static_cast<size_t>(cell.slot * queries + query)];
        const int64_t seen = seen_blocks(query, keys, plan.causal);
        if (cell.first) {
          right = right && row.next_key == -1 && !row.finished;
          row.next_key = 0;
          owner = head;
        }
        right = right && owner == head && row.region != region_number && !row.finished;
        row.region = region_number;
        const int64_t end = std::min(cell.key_end, seen);
        right = right && cell.key == row.next_key && end > cell.key;
        row.next_key = end;
        row.finished = cell.last;
        right = right && cell.last == (end == seen);
      }
      for (int64_t key = cell.key; key < cell.key_end; ++key) {
        Column& column = columns[static_cast<size_t>(cell.stream * keys + key)];
        if (column.head < cell.head) column = {cell.head, queries, column.region};
        right = right && column.head == cell.head && column.region != region_number;
        right = right && column.next_query == cell.query_end;
        column.region = region_number;
        column.next_query = cell.query;
      }
    }
    ++region_number;
  });
  for (const Row& row : rows) right = right && row.finished;
  // The cells of a column (a block of keys) come in falling order of the queries. The last cell begins at the first
  // block of queries that sees the column, rounded down to the side of a cell. A column that no query sees has no cell.
  for (size_t i = 0; i < columns.size(); ++i) {
    const int64_t key = static_cast<int64_t>(i) % keys;
    const int64_t first = plan.causal ? key / plan.step * plan.step : 0;
    right = right && (first < queries ? columns[i].head == plan.heads - 1 && columns[i].next_query == first
                                      : columns[i].head == -1);
  }
  return right;
}

struct Shape {
  int64_t streams, heads, queries, keys, size;
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 64},       {1, 1, 64, 64, 64},     {1, 1, 65, 1, 64},       {1, 1, 1, 1000, 64},
    {1, 1, 1024, 1024, 64}, {3, 1, 333, 333, 64},   {2, 3, 470, 130, 64},    {2, 3, 130, 470, 64},
    {9, 1, 1000, 1000, 64}, {18, 3, 512, 512, 64},  {32, 1, 1024, 1024, 64}, {8, 4, 777, 777, 128},
    {5, 2, 900, 900, 64},   {32, 1, 256, 256, 128}, {7, 1, 2048, 2048, 64},  {64, 2, 200, 200, 64},
};

int check(int64_t most) {
  int64_t plans = 0, broken = 0;
  for (int64_t threads = 1; threads <= most; ++threads)
    for (const Shape& shape : kShapes)
      for (const bool causal : {false, true}) {
        bool right = true;
        const ForwardPlan forward = plan_forward(shape.streams * shape.heads, shape.queries, threads);
        forward_share(forward, ceil_div(shape.keys, kPlanBlock), causal, &right);
        right = right && forward.parts >= 1 && forward.parts <= threads;
        // The second limit on the number of floats leaves memory for the dQ of four streams at a time.
        for (const int64_t floats : {kMostFloats, 4 * ceil_div(shape.queries, kPlanBlock) * kPlanBlock * shape.size})
          right = check_backward(plan_backward(shape.streams, shape.heads, shape.queries, shape.keys, shape.size,
                                               causal, threads, floats)) &&
                  right;
        ++plans;
        if (right) continue;
        ++broken;
        printf("broken: %ld threads, %ld streams of %ld heads, %ld queries, %ld keys, causal %d\n", threads,
               shape.streams, shape.heads, shape.queries, shape.keys, causal);
      }
  for (const bool causal : {false, true})
    for (const Shape& shape : {Shape{0, 1, 10, 10, 8}, Shape{2, 0, 10, 10, 8}, Shape{2, 1, 0, 10, 8}}) {
      int64_t regions = 0;
      plan_backward(shape.streams, shape.heads, shape.queries, shape.keys, shape.size, causal, 7, kMostFloats)
          .each_region([&](const BackwardRegion&) { ++regions; });
      broken += regions != 0;
    }
  printf("%ld plans, %ld broken\n", plans, broken);
  return broken == 0 ? 0 : 1;
}

int share(char** given) {
  int64_t number[7];
  for (int i = 0; i < 7; ++i) number[i] = atoll(given[i]);
  const auto [threads, streams, heads, queries, keys, size, causal] = number;
  bool right = true;
  const Share forward =
      forward_share(plan_forward(streams * heads, queries, threads), ceil_div(keys, kPlanBlock), causal != 0, &right);
  const BackwardPlan plan = plan_backward(streams, heads, queries, keys, size, causal != 0, threads, kMostFloats);
  const Backward backward = backward_share(plan);
  const double most =
      static_cast<double>(threads) * static_cast<double>(backward.share.busiest + kRegionCost * backward.regions);
  printf("%.4f %.4f %ld %ld %.4f\n", forward.of(threads), backward.share.of(threads), plan.step, backward.regions,
         static_cast<double>(backward.useful) / most);
  return right ? 0 : 1;
}

}  // namespace

int main(int count, char** given) {
  if (count == 3 && strcmp(given[1], "check") == 0) return check(atoll(given[2]));
  if (count == 9 && strcmp(given[1], "share") == 0) return share(given + 2);
  fprintf(stderr, "usage: attention_plan check THREADS | share THREADS STREAMS HEADS QUERIES KEYS SIZE CAUSAL\n");
  return 2;
}
