// Divides the rows of a batch, which are sorted by expert, among threads. All threads work together on each long run
// (the rows of one expert), and a single thread computes each other run; see run_plan.h. peft_ext's kernels give the
// same bits for every division of the rows among threads. PyTorch's matrix product may give other bits on another
// number of threads.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/tensor.h"
#include "cpu/threads.h"
#include "linear/cpu/run_plan.h"

namespace peft_ext {

// The rows [begin, end) of a batch, all of one expert.
struct Run {
  int64_t expert, begin, end;
  int64_t rows() const { return end - begin; }
};

// The runs that a RunPlan gives to one thread.
struct RunPart {
  std::atomic<size_t> next{0};  // position in the plan's part of the next run that no thread has taken
  std::atomic<bool> started{false};
};

// Calls call(run) for each run. each_run makes these calls in an unspecified order, on which no result may depend.
// work: the work of a row of x. A thread that has computed its own part takes runs of the parts that other threads have
// started, because threads that share their cores with other programs are slower. A part that no thread has started
// keeps its runs: tools/recorded_loops.cpp runs one part after another, and records the parts of the plan.
template <typename Call>
void each_run(std::vector<Run> runs, const RowWork& work, const Call& call) {
  std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.rows() > b.rows(); });
  std::vector<int64_t> rows;
  for (const Run& run : runs) rows.push_back(run.rows());
  const RunPlan plan = plan_runs(rows, work, loop_threads());
  for (size_t i = 0; i < plan.together; ++i) call(runs[i]);
  const size_t count = plan.parts.size();
  std::vector<RunPart> parts(count);
  parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
    const WithinALoop within;
    for (auto own = static_cast<size_t>(begin); own < static_cast<size_t>(end); ++own) {
      parts[own].started = true;
      for (size_t turn = 0; turn < count; ++turn) {
        const size_t part = (own + turn) % count;
        if (!parts[part].started) continue;
        for (size_t i = parts[part].next++; i < plan.parts[part].size(); i = parts[part].next++)
          call(runs[plan.parts[part][i]]);
      }
    }
  });
}

// Returns a part of a tensor's memory as a tensor without autograd. Threads of a parallel loop do not inherit the
// caller's no-grad mode, so that autograd would record a view of the tensor.
inline Tensor part_of(const Tensor& tensor, int64_t at, const std::vector<int64_t>& sizes,
                      const std::vector<int64_t>& strides) {
  auto* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  return torch::stable::from_blob(data + at * static_cast<int64_t>(tensor.element_size()), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), tensor.scalar_type());
}

// Returns the rows [run.begin, run.end) of a contiguous matrix, without a copy.
inline Tensor rows_of_run(const Tensor& matrix, const Run& run) {
  const int64_t columns = matrix.size(1);
  return part_of(matrix, run.begin * columns, {run.rows(), columns}, {columns, 1});
}

// Checks that m is [S, columns] on the CPU, where S is the number of rows of the batch, and returns m contiguous.
// beside: if given, a tensor whose dtype and number of rows m must have.
inline Tensor checked_rows(const char* op, const char* argument, const Tensor& m, int64_t columns,
                           const Tensor* beside = nullptr) {
  STD_TORCH_CHECK(m.is_cpu() && m.dim() == 2 && m.size(1) == columns, op, ": ", argument, " has ", m.numel(),
                  " elements in ", m.dim(), " dimensions, wanted [S, ", columns, "] on the CPU");
  dtype_of(op, argument, m);
  if (beside != nullptr)
    STD_TORCH_CHECK(m.scalar_type() == beside->scalar_type() && m.size(0) == beside->size(0), op, ": ", argument,
                    " has ", m.size(0), " rows of ", torch::headeronly::toString(m.scalar_type()), ", wanted ",
                    beside->size(0), " of ", torch::headeronly::toString(beside->scalar_type()));
  return as_contiguous(m);
}

}  // namespace peft_ext
