// Rows of one expert after those of another, and the threads that they are shared among: a run that is more than a
// thread's share has all threads, the others one each. So no count of threads changes a bit.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/tensor.h"
#include "cpu/threads.h"

namespace peft_ext {

// Rows [begin, end) of one expert.
struct Run {
  int64_t expert, begin, end;
  int64_t rows() const { return end - begin; }
};

// run(Run) of each. Their order is not told, and nothing may depend on it.
template <typename Call>
void each_run(std::vector<Run> runs, const Call& call) {
  std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.rows() > b.rows(); });
  int64_t rows = 0;
  for (const Run& run : runs) rows += run.rows();
  const int64_t threads = loop_threads();
  size_t shared = 0;
  while (shared < runs.size() && threads > 1 && runs[shared].rows() * threads > rows) call(runs[shared++]);
  std::atomic<size_t> next{shared};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const WithinALoop within;
    for (int64_t thread = begin; thread < end; ++thread)
      for (size_t i = next++; i < runs.size(); i = next++) call(runs[i]);
  });
}

// Part of a tensor's memory as a tensor that no autograd knows: a thread of a loop does not know that it is off.
inline Tensor part_of(const Tensor& tensor, int64_t at, const std::vector<int64_t>& sizes,
                      const std::vector<int64_t>& strides) {
  auto* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  return torch::stable::from_blob(data + at * static_cast<int64_t>(tensor.element_size()), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), tensor.scalar_type());
}

// Rows [begin, end) of a contiguous matrix.
inline Tensor rows_of_run(const Tensor& matrix, const Run& run) {
  const int64_t columns = matrix.size(1);
  return part_of(matrix, run.begin * columns, {run.rows(), columns}, {columns, 1});
}

// m [S, columns], contiguous; beside: what has as many rows, of the same type.
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
