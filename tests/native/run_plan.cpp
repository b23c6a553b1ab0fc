// Plans batches of experts with run_plan.h.
//
//   run_plan check                                     compares the plans of many batches with every other plan
//   run_plan count THREADS MULTIPLICATIONS COLUMNS ROWS...    prints how many runs all threads compute together
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <queue>
#include <random>

#include "linear/cpu/run_plan.h"

using namespace peft_ext;

namespace {

// Returns the cost of the runs from `first` on if each thread, as soon as it is free, computes the next run.
int64_t listed_cost(const std::vector<int64_t>& rows, size_t first, const RowWork& work, int64_t threads) {
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<int64_t>> free;
  for (int64_t i = 0; i < threads; ++i) free.push(0);
  int64_t last = 0;
  for (size_t i = first; i < rows.size(); ++i) {
    const int64_t end = free.top() + rows[i] * work.multiplications;
    free.pop();
    free.push(end);
    last = std::max(last, end);
  }
  return last;
}

struct Check {
  int64_t plans = 0, broken = 0;
  double worst = 0;

  void plan(std::vector<int64_t> rows, const RowWork& work, int64_t threads) {
    std::sort(rows.begin(), rows.end(), std::greater<int64_t>());
    const size_t chosen = runs_together(rows, work, threads);
    int64_t sum = 0, together = 0, least = INT64_MAX, own = 0;
    for (const int64_t of_run : rows) sum += of_run;
    for (size_t count = 0; count <= rows.size(); ++count) {
      const int64_t alone = listed_cost(rows, count, work, threads);
      const int64_t bound = alone_cost(rows, count, sum, work, threads);
      if (bound > alone + work.multiplications) ++broken;
      least = std::min(least, together + alone);
      if (count == chosen) own = together + alone;
      if (count < rows.size()) together += together_cost(rows[count], work, threads), sum -= rows[count];
    }
    ++plans;
    worst = std::max(worst, static_cast<double>(own) / static_cast<double>(least));
    if (chosen > rows.size() || (threads == 1 && chosen > 0)) ++broken;
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
  const RowWork works[] = {{512 * 256, 512}, {512 * 256, 256}, {64 * 64, 64}, {4096 * 14336, 14336}, {4096 * 16, 1, 64}};
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
