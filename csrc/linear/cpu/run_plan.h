// Decides which experts of a batch all threads compute together. This file contains only arithmetic, and uses no
// PyTorch.
//
// A run is the rows of one expert. The threads compute the longest runs together, one run after another, and then each
// further run is computed by a single thread. A run that all threads compute together has few rows for each thread, and
// wakes the threads for each of its parallel loops; a long run that a single thread computes keeps all other threads
// waiting. The unit of each cost below is a multiplication of the busiest thread.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace peft_ext {

// The numbers of columns and of rows in a unit that the tile kernels give to a thread; the same as kPlanRows and
// kPlanStrip of tiles/plan.h.
constexpr int64_t kRunColumns = 64, kRunRows = 16;

// The work of a row of a run. multiplications: their number. columns: number of columns of the result. unit: number of
// rows in a unit. Threads that compute a run together divide the units of the run, of kRunColumns columns each, among
// themselves.
struct RowWork {
  int64_t multiplications, columns, unit = kRunRows;
};

// The cost, for each thread, of waking the threads for the parallel loops of one run.
constexpr int64_t kRunWake = int64_t{1} << 16;

// Returns the cost of a run that all threads compute together.
inline int64_t together_cost(int64_t rows, const RowWork& work, int64_t threads) {
  const int64_t panels = (work.columns + kRunColumns - 1) / kRunColumns, strips = (rows + work.unit - 1) / work.unit;
  const int64_t units = std::max<int64_t>(1, panels * strips), busiest = (units + threads - 1) / threads;
  return rows * work.multiplications / units * busiest + threads * kRunWake;
}

// Returns a lower bound, which is close to the cost, of the cost of the runs from `first` on if a single thread
// computes each run. rows: the numbers of rows of the runs, in descending order. sum: the sum of these numbers from
// `first` on.
inline int64_t alone_cost(const std::vector<int64_t>& rows, size_t first, int64_t sum, const RowWork& work,
                          int64_t threads) {
  int64_t most = (sum + threads - 1) / threads, each = 1;
  // Of the first each * threads + 1 runs, one thread computes at least each + 1.
  for (size_t at = first; at < rows.size(); at += static_cast<size_t>(threads), ++each)
    most = std::max(most, each * rows[at]);
  return most * work.multiplications;
}

// Returns how many of the longest runs all threads compute together. rows: the numbers of rows of the runs, in
// descending order.
inline size_t runs_together(const std::vector<int64_t>& rows, const RowWork& work, int64_t threads) {
  if (threads <= 1) return 0;
  int64_t sum = 0;
  for (const int64_t of_run : rows) sum += of_run;
  size_t best = 0;
  int64_t least = alone_cost(rows, 0, sum, work, threads), together = 0;
  for (size_t count = 1; count <= rows.size(); ++count) {
    together += together_cost(rows[count - 1], work, threads);
    sum -= rows[count - 1];
    // With more runs together the cost is at least this sum, because a run takes at least as long as if its work were
    // divided equally among all threads.
    if (together + sum * work.multiplications / threads >= least) break;
    const int64_t cost = together + alone_cost(rows, count, sum, work, threads);
    if (cost < least) least = cost, best = count;
  }
  return best;
}

}  // namespace peft_ext
