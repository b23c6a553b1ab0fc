// Replaces torch's parallel_for in the library that ThreadSanitizer instruments, with threads whose start and end the
// sanitizer sees. A loop with enough work for several threads runs on up to four threads, for any number of torch's
// threads. A loop within such a loop runs on one thread.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
thread_local bool inside = false;
}  // namespace

extern "C" __attribute__((visibility("default"))) AOTITorchError torch_parallel_for(int64_t begin, int64_t end,
                                                                                    int64_t grain, ParallelFunc run,
                                                                                    void* context) {
  if (begin >= end) return AOTI_TORCH_SUCCESS;
  const int64_t range = end - begin, most = std::max<int64_t>(1, range / std::max<int64_t>(1, grain));
  const int64_t count = inside ? 1 : std::min(kThreads, most), share = (range + count - 1) / count;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share)
    threads.emplace_back([=] {
      inside = true;
      run(first, std::min(first + share, end), context);
    });
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
