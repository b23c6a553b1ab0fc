// Runs the stages of a computation in one parallel loop; see stages.h.
#include "cpu/stages.h"

#include <thread>

namespace peft_ext {
namespace {

// How often a waiting thread looks whether a stage is computed, before it offers its core to other threads. With a core
// for each thread, a stage of few tokens takes fewer looks.
constexpr int kLooks = 1 << 14;
// How often another thread than the calling thread looks whether a stage of one piece is computed, before it takes the
// piece. The calling thread is preferred, because most of what such a stage reads is in its cache.
constexpr int kLooksOfOthers = 256;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Loops& Stages::add(int64_t grain) {
  Stage& stage = stages_.emplace_back();
  stage.grain = grain;
  return stage.loops;
}

void Stages::add_call(std::function<void()> f) { stages_.emplace_back().call = std::move(f); }

void Stages::run() {
  for (Place first = stages_.begin(); first != stages_.end();) {
    if (first->call || as_loops.load(std::memory_order_relaxed)) {
      first->call ? first->call() : first->loops.run(first->grain);
      ++first;
      continue;
    }
    const Place last = std::find_if(first, stages_.end(), [](const Stage& stage) { return bool{stage.call}; });
    run_in_one_loop(first, last);
    first = last;
  }
}

void Stages::run_in_one_loop(Place first, Place last) {
  int64_t most = 1;
  for (Place stage = first; stage != last; ++stage) {
    const int64_t total = stage->loops.total();
    stage->pieces = std::max<int64_t>(1, std::min(loop_threads(), (total + stage->grain - 1) / stage->grain));
    most = std::max(most, stage->pieces);
  }
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> failed{false};
  parallel_for(0, most, 1, [&](int64_t, int64_t) {
    try {
      for (Place stage = first, next = first; stage != last; stage = next) {
        // A thread that takes the only piece of a stage also computes the following stages of one piece.
        const int64_t pieces = stage->pieces;
        do ++next;
        while (pieces == 1 && next != last && next->pieces == 1);
        const auto is_done = [&] { return stage->done.load(std::memory_order_acquire) == pieces; };
        if (pieces == 1 && std::this_thread::get_id() != caller)
          for (int looks = 0; looks < kLooksOfOthers && !is_done(); ++looks) pause();
        for (int64_t piece; (piece = stage->taken.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
          for (Place part = stage; part != next; ++part) {
            const int64_t total = part->loops.total();
            part->loops.run_part(total * piece / pieces, total * (piece + 1) / pieces);
          }
          stage->done.fetch_add(1, std::memory_order_release);
        }
        for (int looks = 0; !is_done(); ++looks) {
          if (failed.load(std::memory_order_relaxed)) return;
          looks < kLooks ? pause() : std::this_thread::yield();
        }
      }
    } catch (...) {
      failed.store(true, std::memory_order_relaxed);
      throw;
    }
  });
}

}  // namespace peft_ext
