// Plans batches of experts with run_plan.h.
//
//   run_plan check    tests that the plans of many batches compute each run once, and compares the cost of each plan
//                     with the plans in which all threads compute any other number of runs together
//   run_plan count THREADS MULTIPLICATIONS COLUMNS ROWS...    prints how many runs all threads compute together
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "linear/cpu/run_plan.h"

using namespace peft_ext;

namespace {

// Returns the cost of the parts of a plan: the cost of the busiest thread.
int64_t parts_cost(const RunPlan& plan, const std::vector<int64_t>& rows, const RowWork& work) {
  int64_t most = 0;
  for (const std::vector<size_t>& part : plan.parts) {
    int64_t cost = 0;
    for (const size_t i : part) cost += run_cost(rows[i], work);
    most = std::max(most, cost);
  }
  return most;
}

struct Check {
  int64_t plans = 0, broken = 0;
  double worst = 0;

  void plan(std::vector<int64_t> rows, const RowWork& work, int64_t threads) {
    std::sort(rows.begin(), rows.end(), std::greater<int64_t>());
    const RunPlan chosen = plan_runs(rows, work, threads);
    std::vector<int> computed(rows.size(), 0);  // how many times a run is computed
    for (size_t i = 0; i < chosen.together; ++i) ++computed[i];
    for (const std::vector<size_t>& part : chosen.parts) {
      if (part.empty()) ++broken;
      for (const size_t i : part) ++computed[i];
    }
    for (const int times : computed) broken += times != 1;
    broken += static_cast<int64_t>(chosen.parts.size()) > threads || (threads == 1 && chosen.together > 0);
    std::vector<int64_t> costs;
    int64_t sum = 0, together = 0, least = INT64_MAX, own = 0;
    for (const int64_t of_run : rows) costs.push_back(run_cost(of_run, work)), sum += costs.back();
    for (size_t count = 0; count <= rows.size(); ++count) {
      // Longest runs first, each to the thread with the least cost: at most 4/3 of the best division.
      const std::vector<int64_t> rest(rows.begin() + static_cast<int64_t>(count), rows.end());
      const int64_t alone = parts_cost(listed(rest, work, threads), rest, work);
      if (alone_cost(costs, count, sum, threads) > alone) ++broken;
      least = std::min(least, together + alone);
      if (count == chosen.together) {
        own = together + parts_cost(chosen, rows, work);
        if (own != together + alone) ++broken;
      }
      if (count < rows.size()) together += together_cost(rows[count], work, threads), sum -= costs[count];
    }
    ++plans;
    worst = std::max(worst, static_cast<double>(own) / static_cast<double>(std::max<int64_t>(1, least)));
  }

  // Returns the plan in which a single thread computes each run.
  static RunPlan listed(const std::vector<int64_t>& rows, const RowWork& work, int64_t threads) {
    RunPlan plan;
    std::vector<int64_t> loads(static_cast<size_t>(threads), 0);
    plan.parts.resize(loads.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const size_t thread = static_cast<size_t>(std::min_element(loads.begin(), loads.end()) - loads.begin());
      plan.parts[thread].push_back(i);
      loads[thread] += run_cost(rows[i], work);
    }
    return plan;
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 4 && strcmp(argv[1], "count") == 0) {
    std::vector<int64_t> rows;
    for (int i = 5; i < argc; ++i) rows.push_back(atoll(argv[i]));
    std::sort(rows.begin(), rows.end(), std::greater<int64_t>());
    printf("%zu\n", runs_together(rows, {atoll(argv[3]), atoll(argv[4])}, atoll(argv[2])));
    return 0;
  }
  Check check;
  std::mt19937 draw(0);
  const RowWork works[] = {
      {512 * 256, 512}, {512 * 256, 256}, {64 * 64, 64}, {4096 * 14336, 14336}, {4096 * 16, 1, 64}};
  for (const RowWork& work : works)
    for (const int64_t threads : {1, 2, 3, 7, 16, 64, 96, 192, 512})
      for (const size_t experts : {1, 2, 3, 8, 9, 60, 64, 65, 128, 256})
        for (const int64_t tokens : {1, 40, 512, 4096})
          for (const bool even : {true, false}) {
            std::vector<int64_t> rows(experts, 0);
            for (int64_t i = 0; i < tokens * 4; ++i) {
              const size_t a = draw() % experts, b = draw() % experts;
              ++rows[even ? a : std::min(a, b)];
            }
            rows.erase(std::remove(rows.begin(), rows.end(), 0), rows.end());
            check.plan(rows, work, threads);
          }
  printf("%ld plans, %ld broken, at most %.3f of the best\n", check.plans, check.broken, check.worst);
  return check.broken == 0 ? 0 : 1;
}
