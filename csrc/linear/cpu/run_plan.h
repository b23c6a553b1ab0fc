// Divides the experts of a batch among threads. This file contains only arithmetic, and uses no PyTorch.
//
// A run is the rows of one expert. All threads compute the longest runs together, one run after another, and then each
// thread computes whole runs of its own. A run that all threads compute together has few rows for each thread, and
// wakes the threads for each of its parallel loops; a long run that a single thread computes keeps all other threads
// waiting. The unit of each cost below is a multiplication of the busiest thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "linear/cpu/tiles/plan.h"

namespace peft_ext {

// To read and rearrange a weight takes about as long as to multiply so many rows with the weight.
constexpr int64_t kRunWeight = 24;
// The cost, for each thread, of waking the threads for the parallel loops of one run.
constexpr int64_t kRunWake = int64_t{1} << 16;

// The work of a row of a run. multiplications: their number. columns: number of columns of the result. unit: number of
// rows in a unit. Threads that compute a run together divide the units of the run, of kPlanRows columns each,
// among themselves.
struct RowWork {
  int64_t multiplications, columns, unit = kPlanStrip;
};

struct RunPlan {
  size_t together = 0;                     // how many of the longest runs all threads compute together
  std::vector<std::vector<size_t>> parts;  // for each thread that computes runs of its own, the indices of the runs
};

// Returns the cost of a run that one thread computes.
inline int64_t run_cost(int64_t rows, const RowWork& work) { return (rows + kRunWeight) * work.multiplications; }

// Returns the cost of a run that all threads compute together.
inline int64_t together_cost(int64_t rows, const RowWork& work, int64_t threads) {
  const int64_t panels = (work.columns + kPlanRows - 1) / kPlanRows, strips = (rows + work.unit - 1) / work.unit;
  const int64_t units = std::max<int64_t>(1, panels * strips), busiest = (units + threads - 1) / threads;
  return run_cost(rows, work) / units * busiest + threads * kRunWake;
}

// Returns a lower bound, which is close to the cost, of the cost of the runs from `first` on if a single thread
// computes each run. costs: run_cost of the runs, in descending order. sum: the sum of these costs from `first` on.
inline int64_t alone_cost(const std::vector<int64_t>& costs, size_t first, int64_t sum, int64_t threads) {
  int64_t most = (sum + threads - 1) / threads, each = 1;
  // Of the first each * threads + 1 runs, one thread computes at least each + 1.
  for (size_t at = first; at < costs.size(); at += static_cast<size_t>(threads), ++each)
    most = std::max(most, each * costs[at]);
  return most;
}

// Returns how many of the longest runs all threads compute together. rows: the numbers of rows of the runs, in
// descending order.
inline size_t runs_together(const std::vector<int64_t>& rows, const RowWork& work, int64_t threads) {
  if (threads <= 1) return 0;
  std::vector<int64_t> costs;
  int64_t sum = 0, together = 0;
  for (const int64_t of_run : rows) {
    costs.push_back(run_cost(of_run, work));
    sum += costs.back();
  }
  size_t best = 0;
  int64_t least = alone_cost(costs, 0, sum, threads);
  for (size_t count = 1; count <= rows.size(); ++count) {
    together += together_cost(rows[count - 1], work, threads);
    sum -= costs[count - 1];
    // With more runs together the cost is at least this sum, because a run takes at least as long as if its work were
    // divided equally among all threads.
    if (together + sum / threads >= least) break;
    const int64_t cost = together + alone_cost(costs, count, sum, threads);
    if (cost < least) least = cost, best = count;
  }
  return best;
}

// Divides the runs among threads. rows: the numbers of rows of the runs, in descending order. Each run that one thread
// computes goes to the thread with the least cost so far.
inline RunPlan plan_runs(const std::vector<int64_t>& rows, const RowWork& work, int64_t threads) {
  RunPlan plan;
  plan.together = runs_together(rows, work, threads);
  const size_t alone = rows.size() - plan.together;
  plan.parts.resize(std::min(alone, static_cast<size_t>(std::max<int64_t>(1, threads))));
  using Load = std::pair<int64_t, size_t>;  // the cost of a thread's runs, and the thread
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
  for (size_t thread = 0; thread < plan.parts.size(); ++thread) loads.push({0, thread});
  for (size_t i = plan.together; i < rows.size(); ++i) {
    const auto [cost, thread] = loads.top();
    loads.pop();
    plan.parts[thread].push_back(i);
    loads.push({cost + run_cost(rows[i], work), thread});
  }
  return plan;
}

}  // namespace peft_ext
