// Adds a small matrix product to a large matrix, in one pass over the large matrix:
//
//   out [T, N] = (before or 0) + mask ∘ (L Fᵀ) + (g - 1) ∘ z + bias,    L [T, R],  F [N, R]
//
// expand_kernel has these uses:
//   forward:     Computes the low-rank term and the bias, Y₀ = S (ρB)ᵀ + b, to which PyTorch's product is added.
//   backward:    Computes the low-rank part of dX. If a pass has stored the bits of the dropout mask, the kernel reads
//                these bits; otherwise it draws the mask again. In the backward, F is Aᵀ and L is P = (g ∘ dY) (ρB),
//                which contains dropout's factor 1/(1-p) except with dropout on the base.
//   residual:    Adds the low-rank term, or a bottleneck adapter's output, to `before`.
//   PEFT's DoRA: With dropout on the base, g and z are given: Y = x Wᵀ + b + g ∘ Z - x̃ Wᵀ with Z = x̃ Wᵀ + L Fᵀ.
// L and F are given as bfloat16 terms (terms.cuh), three for a float32 `out` and two for a 16-bit `out`; F has one term
// if F and `out` are bfloat16 and F is not scaled. R is padded to a multiple of 16, and is 0 if only the bias is added.
//
// A thread block of 4 warps computes 64 x 64 elements of out, and a warp computes 16 rows. The rows of F, which are the
// columns of out, are permuted so that a lane's accumulators are eight adjacent columns of out. Row i of F's tile 4 h +
// j, a tile of 8 rows, is column 32 h + 8 (i / 2) + 2 j + i % 2 of out. Therefore the accumulators of lane t, which are
// the columns 2t and 2t + 1 of the four tiles of h, are the eight columns of out from 32 h + 8 t on. Except in the
// instances for kAny and kGroupedAny, a lane stores these eight elements, 16 bytes (32 bytes for float32), at once. An
// instance for kAny draws the mask of the eight elements from two adjacent counters of Philox, because the eight
// elements need not begin at the first element of a counter. expand_kernel uses no shared memory. Sums are float32, and
// each result is rounded once. Bytes moved: `out` once, and `before` and z once if they are given.
#pragma once

#include "linear/cuda/rank_pass.cuh"

namespace peft_ext {

constexpr int kExpandTile = 64;
constexpr int kExpandThreads = 128;

// Selects the operands, besides L Fᵀ, of an instance of expand_kernel. Besides L Fᵀ, an instance for kBias has only the
// bias. Besides L Fᵀ, an instance for kMask has only the stored bits of the dropout mask, and an instance for kDrawn
// has only the dropout mask, which the kernel draws. An instance for kOnto adds `before`, the bias and (g - 1) ∘ z. An
// instance for kAny has all these operands, for any shape and alignment, and draws the dropout mask. An instance for
// kGrouped has the bias and the rows of a RowTable, in which each tile has its own factor F or none. An instance for
// kGroupedAny is like one for kGrouped, for any shape and alignment.
enum class ExpandWork { kBias, kMask, kDrawn, kOnto, kAny, kGrouped, kGroupedAny };

struct ExpandTerms {
  void* out;
  int64_t rows, columns;
  Terms left;  // bfloat16 terms of L: outer = rows, inner = ranks
  Terms right;
  const void* before;  // matrix [rows, columns] of type T, added to the result, or null; may be `out`
  const void* bias;    // bias [columns] of bias_type (kBias, kGrouped: T; kOnto: float32), or null
  DType bias_type;
  float bias_scale;
  const void* z;          // z [rows, columns] of type T, or null
  const float* scale;     // g [columns], given together with z
  const uint32_t* kept;   // for kMask: bits of the dropout mask, in the layout of kKeptBits
  DeviceDropout dropout;  // for kDrawn and kAny: parameters of dropout, to draw the mask again
  // For kGrouped and kGroupedAny: the rows of each tile of `out`; `left` has its rows in the order of this table.
  RowTable table;
  int64_t tiles;         // number of tiles of 64 rows of `out`
  int64_t right_stride;  // distance from the terms of one adapter's F to the terms of the next F, in units of 16 bytes
};

// Largest number of layers of one input whose low-rank parts of dX expand_sum_kernel adds in one write,
// out = Σ_i mask_i ∘ (L_i F_iᵀ).
constexpr int kMostExpandParts = 8;
struct ExpandPart {
  Terms left, right;
  const uint32_t* kept;  // bits of the layer's dropout mask; null if the layer has no dropout
};
struct ExpandSum {
  void* out;
  int64_t rows, columns;  // sizes of `out` in elements; columns is a multiple of eight
  int count;
  ExpandPart parts[kMostExpandParts];
};

template <typename T>
constexpr int kExpandLeftTerms = sizeof(T) == 4 ? 3 : 2;

// Adds L Fᵀ over 16 ranks to `c`, the warp's sums for 16 rows and 64 columns of `out`. The rows begin at row 16 ·
// `rows`, the columns at column 64 · `column_tile`, and the ranks at rank 16 · `step`. `outer` holds the bfloat16 terms
// of L, and `factor` points to the bfloat16 terms of F.
template <typename T, int kRightTerms>
__device__ __forceinline__ void expand_product(const Terms& outer, const uint4* factor, uint32_t rows,
                                               uint32_t column_tile, int64_t step, float (&c)[2][4][4]) {
  constexpr int kLeftTerms = kExpandLeftTerms<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t steps = outer.inner / 16;
  const uint4* left = outer.data + (rows * steps + step) * kLeftTerms * kWarpSize + lane;
  const uint4* right = factor + (column_tile * steps + step) * kRightTerms * 4 * kWarpSize + lane;
  uint32_t a[kLeftTerms][4];
  uint4 held[kRightTerms][4];
#pragma unroll
  for (int i = 0; i < kLeftTerms; ++i) {
    const uint4 words = load_cached(left + i * kWarpSize);
    a[i][0] = words.x, a[i][1] = words.y, a[i][2] = words.z, a[i][3] = words.w;
  }
#pragma unroll
  for (int term = 0; term < kRightTerms; ++term)
#pragma unroll
    for (int two = 0; two < 4; ++two) held[term][two] = load_cached(right + (term * 4 + two) * kWarpSize);
#pragma unroll
  for (int term = kRightTerms - 1; term >= 0; --term)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 low = held[term][2 * h], high = held[term][2 * h + 1];
      const uint32_t b[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
      mma_terms<4, kLeftTerms, kLeftTerms>(c[h], a, b, term);
    }
}

// kSteps: number of steps of 16 ranks of L Fᵀ if the number is known at compile time, otherwise 0.
// Grid: x has a thread block for each tile of 64 rows; y has one for each tile of 64 columns.
template <typename T, int kSteps, int kRightTerms, ExpandWork kWork>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(ExpandTerms work) {
  PEFT_EXT_KERNEL;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kExpandTile + warp * 16 + g;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kExpandTile + 8 * t;

  // named: the rows of `out` to which the rows g and g + 8 of this warp's 16 rows are written; negative if a row is
  // unused.
  constexpr bool kTabled = kWork == ExpandWork::kGrouped || kWork == ExpandWork::kGroupedAny;
  [[maybe_unused]] int32_t named[2];
  const uint4* factor = work.right.data;
  bool product = true;
  if constexpr (kTabled) {
#pragma unroll
    for (int half = 0; half < 2; ++half) named[half] = work.table.rows[row + 8 * half];
    const int32_t index = work.table.tiles[blockIdx.x].factor;
    factor += index * work.right_stride;
    product = index >= 0;
  }

  float sums[2][4][4] = {};
  if (!product) {
    // The rows of the tile have no adapter, so that there is no low-rank product.
  } else if constexpr (kSteps > 0) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      expand_product<T, kRightTerms>(work.left, factor, blockIdx.x * 4 + threadIdx.x / kWarpSize, blockIdx.y, step,
                                     sums);
  } else {
    // A new accumulator for every 64 ranks limits the error, because a tensor core rounds its sums toward zero.
    const int64_t steps = work.left.inner / 16;
    for (int64_t first = 0; first < steps; first += 4) {
      float fresh[2][4][4] = {};
      const int64_t last = min_of(first + 4, steps);
      for (int64_t step = first; step < last; ++step)
        expand_product<T, kRightTerms>(work.left, factor, blockIdx.x * 4 + threadIdx.x / kWarpSize, blockIdx.y, step,
                                       fresh);
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[h][j][i] += fresh[h][j][i];
    }
  }

  constexpr bool kWhole = kWork != ExpandWork::kAny && kWork != ExpandWork::kGroupedAny;
  constexpr bool kMasked = kWork == ExpandWork::kMask || kWork == ExpandWork::kDrawn;
  [[maybe_unused]] const Philox philox = kWhole && kWork != ExpandWork::kDrawn ? Philox{} : load_philox(work.dropout);
  T* const out = static_cast<T*>(work.out) + row * work.columns;
  [[maybe_unused]] T* of_row[2];
  if constexpr (kTabled) {
#pragma unroll
    for (int half = 0; half < 2; ++half) of_row[half] = static_cast<T*>(work.out) + named[half] * work.columns;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t first = column + 32 * h;
    if (first >= work.columns) continue;
    float bias[kVector] = {};
    if (!kMasked && work.bias != nullptr) {
      if constexpr (kWork == ExpandWork::kBias || kWork == ExpandWork::kGrouped) {
        load_vector(static_cast<const T*>(work.bias) + first, bias);
      } else if constexpr (kWork == ExpandWork::kOnto) {
        load_vector(static_cast<const float*>(work.bias) + first, bias);
      } else {
        load_columns(work.bias, work.bias_type, 0, first, work.columns, false, bias);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) bias[i] *= work.bias_scale;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = kTabled ? named[half] : row + 8 * half;
      if (kTabled ? at < 0 : at >= work.rows) continue;
      float values[kVector];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[2 * j] = sums[h][j][2 * half];
        values[2 * j + 1] = sums[h][j][2 * half + 1];
      }
      T* const to = kTabled ? of_row[half] : out + 8 * half * work.columns;
      if constexpr (kWork == ExpandWork::kMask) {
        const int64_t tile = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
        const uint32_t kept = work.kept[tile * kRankThreads + (g + 8 * half) * 8 + h * 4 + t] << (4 * warp);
        uint32_t masks[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) masks[i] = kept << i;
        save_masked(to + first, values, masks);
      } else if constexpr (kWork == ExpandWork::kDrawn) {
        const uint4 words = kept_of_words(philox, static_cast<uint64_t>(at * work.columns + first) / kPhiloxGroup);
        save_masked(to + first, values, {words.x, words.y, words.z, words.w});
      } else {
        if constexpr (kWork == ExpandWork::kAny) {
          if (work.dropout.active) {
            const uint32_t kept = kept_elements(philox, at * work.columns + first, false);
#pragma unroll
            for (int i = 0; i < kVector; ++i) values[i] = (kept >> i) & 1u ? values[i] : 0.0f;
          }
        }
        if constexpr (kWork == ExpandWork::kOnto || kWork == ExpandWork::kAny) {
          if (work.before != nullptr) {
            float before[kVector];
            load_columns(static_cast<const T*>(work.before) + at * work.columns, first, work.columns, kWhole, before);
#pragma unroll
            for (int i = 0; i < kVector; ++i) values[i] += before[i];
          }
          if (work.z != nullptr) {
            float z[kVector], scale[kVector];
            load_columns(static_cast<const T*>(work.z) + at * work.columns, first, work.columns, kWhole, z);
            load_columns(work.scale, first, work.columns, kWhole, scale);
#pragma unroll
            for (int i = 0; i < kVector; ++i) values[i] += (scale[i] - 1.0f) * z[i];
          }
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] += bias[i];
        save_columns(to, first, work.columns, kWhole, values);
      }
    }
  }
}

// Grid: x has a thread block for each tile of 64 rows; y has one for each tile of 64 columns.
template <typename T, int kRightTerms>
__global__ void __launch_bounds__(kExpandThreads, 4) expand_sum_kernel(ExpandSum work) {
  PEFT_EXT_KERNEL;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kExpandTile + warp * 16 + g;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kExpandTile + 8 * t;
  const int64_t kept_at = (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kRankThreads + g * 8 + t;

  float sums[2][4][4] = {};
  for (int i = 0; i < work.count; ++i) {
    const ExpandPart& part = work.parts[i];
    uint32_t kept[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        kept[h][half] = part.kept == nullptr ? ~0u : part.kept[kept_at + half * 64 + h * 4] << (4 * warp);
    // A new accumulator for every 64 ranks limits the error, because a tensor core rounds its sums toward zero.
    const int64_t steps = part.left.inner / 16;
    for (int64_t first = 0; first < steps; first += 4) {
      float fresh[2][4][4] = {};
      const int64_t last = min_of(first + 4, steps);
#pragma unroll 1
      for (int64_t step = first; step < last; ++step)
        expand_product<T, kRightTerms>(part.left, part.right.data, blockIdx.x * 4 + threadIdx.x / kWarpSize, blockIdx.y,
                                       step, fresh);
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t mask = part.kept == nullptr ? ~0u : kept[h][half] << j;
            const uint32_t low = __float_as_uint(fresh[h][j][2 * half]) & spread_sign<false>(mask);
            const uint32_t high = __float_as_uint(fresh[h][j][2 * half + 1]) & spread_sign<true>(mask);
            sums[h][j][2 * half] += __uint_as_float(low);
            sums[h][j][2 * half + 1] += __uint_as_float(high);
          }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (column + 32 * h >= work.columns || row + 8 * half >= work.rows) continue;
      float values[kVector];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[2 * j] = sums[h][j][2 * half];
        values[2 * j + 1] = sums[h][j][2 * half + 1];
      }
      save_vector(static_cast<T*>(work.out) + (row + 8 * half) * work.columns + column + 32 * h, values);
    }
}

}  // namespace peft_ext
