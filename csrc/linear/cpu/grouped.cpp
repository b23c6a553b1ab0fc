// Computes the low-rank terms of several adapters in one batch, S_t = x_t A_gᵀ and s_g S_t B_gᵀ for each token t of
// adapter g. See grouped.h.
#include "cpu/threads.h"
#include "linear/cpu/grouped.h"

#include <string.h>

#include <algorithm>

namespace peft_ext {

namespace {

constexpr int64_t kTaskTokens = 32;           // largest number of tokens of a segment in one task of a thread
constexpr int64_t kTaskElements = 64 * 1024;  // target number of elements of lora_A or lora_B in a FewTask

// A task of one thread: multiplies the rows [begin, end) of an adapter's lora_A with x of a segment's tokens, or rows
// of the adapter's lora_B with S of these tokens.
struct FewTask {
  FewTokens work;
  int64_t begin, end;
};

void add_few_tasks(const Tensor& w, const char* op, const char* argument, int64_t tokens, const float* x, float* y,
                   bool accumulate, std::vector<FewTask>* tasks) {
  FewTokens work;
  work.w = w.const_data_ptr();
  work.dtype = dtype_of(op, argument, w);
  work.rows = w.size(0);
  work.columns = w.size(1);
  work.tokens = tokens;
  work.x = x;
  work.y = y;
  work.accumulate = accumulate;
  const int64_t step = std::max<int64_t>(8, kTaskElements / std::max<int64_t>(1, work.columns));
  for (int64_t row = 0; row < work.rows; row += step) tasks->push_back({work, row, min_i64(row + step, work.rows)});
}

void run(const std::vector<FewTask>& tasks) {
  const PassKernels& isa = pass_kernels();
  parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const FewTask& task = tasks[static_cast<size_t>(i)];
      isa.few_tokens(task.work, task.begin, task.end);
    }
  });
}

// Copies S of each segment, [tokens of the segment, rank of the segment's adapter], into the segment's rows of the
// operator's result s [tokens of the batch, largest rank], and sets all other elements of s to zero.
void save_s(const Groups& groups, const GroupedS& from, float* out) {
  const int64_t tokens = groups.segments.empty() ? 0 : groups.segments.back().end;
  std::fill_n(out, tokens * groups.rank, 0.0f);
  for (size_t i = 0; i < groups.segments.size(); ++i) {
    const Segment& segment = groups.segments[i];
    if (segment.group < 0) continue;
    const size_t bytes = static_cast<size_t>(groups.rank_of(segment)) * sizeof(float);
    for (int64_t t = 0; t < segment.tokens(); ++t)
      memcpy(out + (segment.begin + t) * groups.rank, from.of(i) + t * from.strides[i], bytes);
  }
}

GroupedS empty_s(const Groups& groups) {
  GroupedS s;
  int64_t total = 0;
  for (const Segment& segment : groups.segments) {
    const int64_t rank = segment.group < 0 ? 0 : groups.rank_of(segment);
    s.strides.push_back(rank);
    s.offsets.push_back(total);
    total += s.strides.back() * segment.tokens();
  }
  s.storage = empty({total}, ScalarType::Float);
  return s;
}

// Returns make(group) for every adapter that has tokens, and an undefined Tensor for every other adapter.
template <typename Make>
std::vector<Tensor> of_used(const Groups& groups, const Make& make) {
  std::vector<Tensor> made(groups.lora_A.size());
  for (const Segment& segment : groups.segments) {
    if (segment.group < 0) continue;
    const auto g = static_cast<size_t>(segment.group);
    if (!made[g].defined()) made[g] = make(g);
  }
  return made;
}

std::vector<float> scales(const Groups& groups, size_t group) {
  return std::vector<float>(static_cast<size_t>(groups.lora_A[group].size(0)), groups.scaling[group]);
}

}  // namespace

Groups make_groups(const char* op, const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                   const std::vector<double>& scaling, const std::vector<int64_t>& adapters, int64_t tokens, int64_t in,
                   int64_t out) {
  const auto count = static_cast<int64_t>(lora_A.size());
  STD_TORCH_CHECK(lora_B.size() == lora_A.size() && scaling.size() == lora_A.size(), op, ": ", lora_A.size(),
                  " of lora_A, ", lora_B.size(), " of lora_B and ", scaling.size(), " of scaling, wanted as many");
  Groups groups;
  for (size_t g = 0; g < lora_A.size(); ++g) {
    const Tensor &a = lora_A[g], &b = lora_B[g];
    STD_TORCH_CHECK(a.is_cpu() && a.dim() == 2 && a.size(1) == in, op, ": lora_A ", g, " has ", a.numel(),
                    " elements, wanted [R, ", in, "] on the CPU");
    STD_TORCH_CHECK(b.is_cpu() && b.dim() == 2 && b.size(0) == out && b.size(1) == a.size(0), op, ": lora_B ", g,
                    " is not [", out, ", ", a.size(0), "] on the CPU");
    dtype_of(op, "lora_A", a);
    dtype_of(op, "lora_B", b);
    groups.lora_A.push_back(as_contiguous(a));
    groups.lora_B.push_back(as_contiguous(b));
    groups.scaling.push_back(static_cast<float>(scaling[g]));
    groups.rank = std::max(groups.rank, a.size(0));
  }
  const auto samples = static_cast<int64_t>(adapters.size());
  STD_TORCH_CHECK(samples > 0 ? tokens % samples == 0 : tokens == 0, op, ": adapters has ", samples,
                  " elements for x of ", tokens, " tokens");
  const int64_t length = samples > 0 ? tokens / samples : 0;
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t group = adapters[static_cast<size_t>(i)];
    STD_TORCH_CHECK(group >= -1 && group < count, op, ": adapters has ", group, ", wanted -1 to ", count - 1);
    if (length == 0) continue;
    if (!groups.segments.empty() && groups.segments.back().group == group)
      groups.segments.back().end += length;
    else
      groups.segments.push_back({i * length, (i + 1) * length, group});
  }
  return groups;
}

GroupedS grouped_shrink(const char* op, const Groups& groups, const Tensor& x, const Tensor& s) {
  const int64_t k = x.size(1);
  const DType dtype = dtype_of(op, "x", x);
  GroupedS out = empty_s(groups);
  if (k == 0) {
    std::fill_n(out.storage.mutable_data_ptr<float>(), out.storage.numel(), 0.0f);
  } else {
    const std::vector<Tensor> rights = of_used(groups, [&](size_t g) {
      const Tensor& a = groups.lora_A[g];
      return packed(op, "lora_A", a, nullptr, nullptr, false, a.size(0), k);
    });
    struct Task {
      RowPass pass;
      int64_t tokens;
    };
    std::vector<Task> tasks;
    const auto* data = static_cast<const char*>(x.const_data_ptr());
    for (size_t i = 0; i < groups.segments.size(); ++i) {
      const Segment& segment = groups.segments[i];
      if (segment.group < 0) continue;
      RowPass pass = make_row_pass(x, dtype, k, out.strides[i], Dropout());
      pass.right = rights[static_cast<size_t>(segment.group)].const_data_ptr<float>();
      for (int64_t t = 0; t < segment.tokens(); t += kTaskTokens) {
        pass.m = data + (segment.begin + t) * k * static_cast<int64_t>(x.element_size());
        pass.out = out.of(i) + t * out.strides[i];
        tasks.push_back({pass, min_i64(kTaskTokens, segment.tokens() - t)});
      }
    }
    const PassKernels& isa = pass_kernels();
    parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Task& task = tasks[static_cast<size_t>(i)];
        isa.row_pass(task.pass, 0, task.tokens, 0, k);
      }
    });
  }
  save_s(groups, out, s.mutable_data_ptr<float>());
  return out;
}

void grouped_few_tokens(const char* op, const Groups& groups, const float* x, int64_t in, float* y, int64_t out,
                        float* s) {
  const GroupedS sums = empty_s(groups);
  std::vector<FewTask> tasks;
  for (size_t i = 0; i < groups.segments.size(); ++i) {
    const Segment& segment = groups.segments[i];
    if (segment.group < 0) continue;
    add_few_tasks(groups.lora_A[static_cast<size_t>(segment.group)], op, "lora_A", segment.tokens(),
                  x + segment.begin * in, sums.of(i), false, &tasks);
  }
  run(tasks);
  save_s(groups, sums, s);
  tasks.clear();
  for (size_t i = 0; i < groups.segments.size(); ++i) {
    const Segment& segment = groups.segments[i];
    if (segment.group < 0) continue;
    const auto g = static_cast<size_t>(segment.group);
    float* left = sums.of(i);
    for (int64_t j = 0; j < segment.tokens() * sums.strides[i]; ++j) left[j] *= groups.scaling[g];
    add_few_tasks(groups.lora_B[g], op, "lora_B", segment.tokens(), left, y + segment.begin * out, true, &tasks);
  }
  run(tasks);
}

void grouped_expand(const char* op, const Groups& groups, const GroupedS& s, const Expand& finish) {
  const std::vector<Tensor> rights = of_used(groups, [&](size_t g) {
    const Tensor& b = groups.lora_B[g];
    return packed(op, "lora_B", b, nullptr, scales(groups, g).data(), true, b.size(1), finish.stride);
  });
  struct Task {
    Expand work;
    int64_t begin, end;
  };
  std::vector<Task> tasks;
  for (size_t i = 0; i < groups.segments.size(); ++i) {
    const Segment& segment = groups.segments[i];
    Expand work = finish;
    work.rank = s.strides[i];
    if (segment.group >= 0) {
      work.left = s.of(i) - segment.begin * s.strides[i];  // the kernel indexes `left` by the token's index in x
      work.right = rights[static_cast<size_t>(segment.group)].const_data_ptr<float>();
    }
    for (int64_t t = segment.begin; t < segment.end; t += kTaskTokens)
      tasks.push_back({work, t, min_i64(t + kTaskTokens, segment.end)});
  }
  const PassKernels& isa = pass_kernels();
  parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[static_cast<size_t>(i)];
      isa.expand(task.work, task.begin, task.end, 0, finish.columns);
    }
  });
}

GroupedTerms grouped_terms(const char* op, const Groups& groups, const GroupedS& s, int64_t tokens, int64_t out) {
  GroupedTerms made;
  made.held = of_used(groups, [&](size_t g) {
    // The tile kernel reads whole blocks of kColumnStep rows of s_g B_g.
    const Tensor& b = groups.lora_B[g];
    return packed(op, "lora_B", b, nullptr, scales(groups, g).data(), false, round_up(out, kColumnStep), b.size(1));
  });
  // A strip of tokens has one low-rank term for each adapter that a token of the strip has. In the term of an adapter,
  // S is zero for the tokens of other adapters.
  struct Part {
    int64_t group, offset;
  };
  struct Piece {
    size_t segment, part;
    int64_t strip;
  };
  const int64_t strips = ceil_div(tokens, kStrip);
  std::vector<Part> parts;
  std::vector<Piece> pieces;
  int64_t total = 0;
  size_t from = 0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    made.first.push_back(static_cast<int64_t>(parts.size()));
    while (groups.segments[from].end <= strip * kStrip) ++from;
    for (size_t i = from; i < groups.segments.size() && groups.segments[i].begin < (strip + 1) * kStrip; ++i) {
      const int64_t group = groups.segments[i].group;
      if (group < 0) continue;
      auto part = static_cast<size_t>(made.first.back());
      while (part < parts.size() && parts[part].group != group) ++part;
      if (part == parts.size()) {
        parts.push_back({group, total});
        total += groups.rank_of(groups.segments[i]) * kStrip;
      }
      pieces.push_back({i, part, strip});
    }
  }
  made.first.push_back(static_cast<int64_t>(parts.size()));
  const Tensor values = zeros({total});
  float* data = values.mutable_data_ptr<float>();
  for (const Part& part : parts) {
    const Tensor& b = made.held[static_cast<size_t>(part.group)];
    made.terms.push_back({b.size(1), data + part.offset, b.const_data_ptr<float>(), 0});
  }
  for (const Piece& piece : pieces) {
    const Segment& segment = groups.segments[piece.segment];
    TileTerm& term = made.terms[piece.part];
    float* to = data + parts[piece.part].offset;
    const int64_t first = piece.strip * kStrip, stride = s.strides[piece.segment];
    const int64_t begin = std::max(segment.begin, first), end = min_i64(segment.end, first + kStrip);
    for (int64_t t = begin; t < end; ++t) {
      const float* row = s.of(piece.segment) + (t - segment.begin) * stride;
      term.lanes = static_cast<uint16_t>(term.lanes | 1u << (t - first));
      for (int64_t r = 0; r < term.rank; ++r) to[r * kStrip + t - first] = row[r];
    }
  }
  made.held.push_back(values);
  return made;
}

}  // namespace peft_ext
