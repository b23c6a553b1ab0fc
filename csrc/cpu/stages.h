// Stages of a computation that run in one parallel loop. Each stage needs the results of all stages before it.
#pragma once

#include <atomic>
#include <deque>
#include <functional>

#include "cpu/threads.h"

namespace peft_ext {

// The stages run in the order in which they are added. Between two stages the
// threads of one loop wait for each other, which takes less time than to end a loop and to start the next.
//
// A thread takes the next piece of a stage that no thread has taken, until none is left, and then waits until the
// pieces that other threads have taken are computed. So it does not matter how many threads torch gives to the loop,
// and when they start: one thread alone takes all pieces. The pieces of a stage do not depend on which thread takes
// them.
class Stages {
 public:
  // Adds a stage, to whose loops the caller adds its loops. grain: the smallest work of a piece, in the unit of the
  // loops' work.
  Loops& add(int64_t grain);

  // Adds a stage without loops: a function that runs on the calling thread alone, and may run parallel loops. The
  // stages before it and the stages after it run in different loops.
  void add_call(std::function<void()> f);

  // Runs all stages. If a stage throws, `run` throws the first exception, and later stages do not run.
  void run();

  // Whether `run` runs each stage as a parallel loop of its own; see peft_ext_stages_as_loops in common/api.h.
  static inline std::atomic<bool> as_loops{false};

 private:
  struct Stage {
    Loops loops;
    int64_t grain = 1, pieces = 0;
    std::function<void()> call;
    std::atomic<int64_t> taken{0}, done{0};  // numbers of pieces
  };
  using Place = std::deque<Stage>::iterator;

  static void run_in_one_loop(Place first, Place last);

  std::deque<Stage> stages_;  // an atomic can't be moved, as the elements of a vector are
};

}  // namespace peft_ext
