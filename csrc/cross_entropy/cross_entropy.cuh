// Cross entropy of the rows of a chunk of logits x. If needs_grad, the kernel overwrites x with the gradient:
//
//   z = c tanh(a x / c), or a x if c = 0;   lse = log Σ_v exp z_v;   ε is the smoothing;
//   loss = (1 - ε) (lse - z_label) + ε (lse - mean z);
//   x <- w dloss/dx = w a (1 - (z/c)²) (exp(z - lse) - (1 - ε) [v = label] - ε / V)
//
// In these formulas, a is the scale of the logits, c is the softcap, w is the weight of the row, and V is the number of
// columns. If c = 0, the factor 1 - (z/c)² is left out.
//
// A block of kThreads threads computes a row, and a thread reads every kThreads-th group of eight columns. In the first
// reading of the row, each thread computes its largest z, its sum of exp(z - largest) and its sum of z; these values
// are combined over lanes and then over warps in a fixed order. If needs_grad, a second reading of the row, from the
// last column to the first, computes the gradient. If a row has more than 64 KiB, the block keeps up to 96 KiB from the
// start of the row in shared memory for the second reading, and reads the rest of the row from global memory again.
// With two blocks of 1,024 threads on each of the 132 multiprocessors of an H100, the parts of the rows that are
// outside of shared memory have 42 MB together if a row has 128,000 16-bit logits, and 54 MB if a row has 152,000. The
// L2 cache of an H100 has 50 MB. If the parts outside of shared memory do not fit in L2, L2 holds the ends of the rows,
// which the second reading needs first. Loads of columns that stay in shared memory and stores of the gradient are
// streaming (ld.cs, st.cs), so that L2 drops the data of these loads and stores first. Arithmetic is in float32, and
// each result is rounded once. With the gradient, the kernel writes each row once, and reads each row from DRAM once,
// except that it reads columns twice that neither shared memory nor L2 holds.
#pragma once

#include <math.h>

#include "cuda/block_sum.cuh"
#include "cuda/vector.cuh"

namespace peft_ext {

struct CrossEntropyWork {
  void* logits;             // logits x [T, V]; overwritten with the gradient if needs_grad
  const int64_t* labels;    // labels [T]; an ignored label gives loss and gradient 0, a label out of range traps
  const float* row_weight;  // row weights w [T]; a null pointer stands for ones
  float* losses;            // receives the losses [T], not multiplied by w
  // columns: V, the number of logits of a row. ignored: the label of tokens that have loss 0 and gradient 0.
  int64_t columns, ignored;
  float scale, softcap, smoothing;
  bool needs_grad, whole;
};

// kCrossEntropyThreads and kLongRowThreads: number of threads of a block for a row of up to kShortRow bytes, and for a
// longer row. kHeldBytes: largest number of bytes of a longer row that stay in shared memory. kHeldBytes is 96 KiB,
// because a block has at most 99 KiB of shared memory on a GPU of compute capability 8.6.
constexpr int kCrossEntropyThreads = 512, kLongRowThreads = 1024;
constexpr int64_t kShortRow = 65536, kHeldBytes = 98304;

// Largest number of threads that a multiprocessor can run at a time. The launch bounds of the kernel limit its
// registers so that this number of threads fits, because a block waits for memory most of the time.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMostThreads = 1536;
#else
constexpr int kMostThreads = 2048;
#endif

// The softmax sums of some columns of a row. most: the largest z; sum: the sum of exp(z - most); total: the sum of z.
struct SoftmaxSum {
  float most, sum, total;
};

// Start value of the largest z of a thread. The value is finite, so that the exponential of a logit of -inf is 0 and
// not NaN.
constexpr float kLowest = -3.0e38f;

__device__ __forceinline__ SoftmaxSum joined(const SoftmaxSum& a, const SoftmaxSum& b) {
  const float most = fmaxf(a.most, b.most);
  return {most, a.sum * expf(a.most - most) + b.sum * expf(b.most - most), a.total + b.total};
}

template <int kThreads>
using SoftmaxShared = float[3][kThreads / kWarpSize];

// Returns the softmax sums of the whole row to every thread of the block. All threads of the block must call
// block_joined.
template <int kThreads>
__device__ __forceinline__ SoftmaxSum block_joined(SoftmaxSum mine, SoftmaxShared<kThreads>& shared) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const SoftmaxSum other{shuffle_xor(mine.most, mask), shuffle_xor(mine.sum, mask), shuffle_xor(mine.total, mask)};
    mine = joined(mine, other);
  }
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0)
    shared[0][warp] = mine.most, shared[1][warp] = mine.sum, shared[2][warp] = mine.total;
  sync_threads();
  SoftmaxSum all{shared[0][0], shared[1][0], shared[2][0]};
  for (int w = 1; w < kThreads / kWarpSize; ++w) all = joined(all, {shared[0][w], shared[1][w], shared[2][w]});
  return all;
}

// Grid: one block for each row. A block of kLongRowThreads threads has kHeldBytes of dynamic_shared().
template <typename T, bool kSoftcap, int kThreads>
__global__ void __launch_bounds__(kThreads, kMostThreads / kThreads) cross_entropy_kernel(CrossEntropyWork work) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(SoftmaxShared<kThreads>, shared);
  const int64_t at = blockIdx.x, columns = work.columns, label = work.labels[at];
  T* row = static_cast<T*>(work.logits) + at * columns;
  // `held` points to the columns that stay in shared memory. A thread reads only those elements of `held` that the
  // thread itself wrote, so that no barrier is needed.
  constexpr bool kHolds = kThreads == kLongRowThreads;
  [[maybe_unused]] T* held = nullptr;
  if constexpr (kHolds) held = reinterpret_cast<T*>(dynamic_shared());
  const auto holds = [&](int64_t column) {
    return kHolds && column + kVector <= min_of(columns, kHeldBytes / static_cast<int64_t>(sizeof(T)));
  };
  const bool ignored = label == work.ignored, inside = label >= 0 && label < columns;
  // A label out of range stops the kernel, like PyTorch's cross entropy; a user would notice a loss of NaN late or not
  // at all.
  if (!ignored && !inside) trap();
  const float inner = kSoftcap ? work.scale / work.softcap : work.scale, over = kSoftcap ? 1.0f / work.softcap : 0.0f;
  const auto z_of = [&](float x) { return kSoftcap ? work.softcap * tanhf(x * inner) : x * inner; };

  SoftmaxSum mine{kLowest, 0.0f, 0.0f};
  if (!ignored) {
    for (int64_t column = threadIdx.x * kVector; column < columns; column += kThreads * kVector) {
      float z[kVector];
      if (kHolds && holds(column)) {
        load_columns<Reuse::kStreaming>(row, column, columns, work.whole, z);
        if (work.needs_grad) save_vector(held + column, z);
      } else {
        load_columns(row, column, columns, work.whole, z);
      }
      const int count = static_cast<int>(min_of(kVector, columns - column));
      float most = mine.most;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        z[i] = z_of(z[i]);
        if (i < count) most = fmaxf(most, z[i]), mine.total += z[i];
      }
      if (most > mine.most) mine.sum *= expf(mine.most - most), mine.most = most;
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i < count) mine.sum += expf(z[i] - mine.most);
    }
  }
  const float z_label = !ignored && inside ? z_of(load_value(row + label)) : 0.0f;
  // The read of row[label] is before the barrier in block_joined, and each write of the row is after the barrier.
  const SoftmaxSum all = block_joined<kThreads>(mine, shared);
  const float rest = 1.0f - work.smoothing, log_sum = logf(all.sum);
  if (threadIdx.x == 0) {
    float loss = rest * (log_sum - (z_label - all.most));
    if (work.smoothing != 0.0f)
      loss += work.smoothing * (log_sum - (all.total / static_cast<float>(columns) - all.most));
    work.losses[at] = ignored ? 0.0f : loss;
  }
  if (!work.needs_grad) return;

  const float by = work.scale * (work.row_weight == nullptr ? 1.0f : work.row_weight[at]);
  const float share = 1.0f / all.sum, even = work.smoothing / static_cast<float>(columns);
  // The gradient is computed from the last columns to the first, because L2 still holds the columns that were read
  // last.
  constexpr int64_t kStep = kThreads * kVector;
  const int64_t first = threadIdx.x * kVector, last = first + (columns - 1 - first) / kStep * kStep;
  for (int64_t column = first < columns ? last : -1; column >= 0; column -= kStep) {
    float out[kVector] = {};
    if (!ignored) {
      if (kHolds && holds(column)) {
        load_vector(held + column, out);
      } else {
        load_columns(row, column, columns, work.whole, out);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float z = z_of(out[i]), t = z * over;
        const float d = by * (expf(z - all.most) * share - even - (column + i == label ? rest : 0.0f));
        out[i] = kSoftcap ? d * (1.0f - t * t) : d;
      }
    }
    save_columns<Reuse::kStreaming>(row, column, columns, work.whole, out);
  }
}

}  // namespace peft_ext
