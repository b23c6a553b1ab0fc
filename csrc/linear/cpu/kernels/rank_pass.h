// Kernels for RowPass, for example S = x̃ Aᵀ and dA = Pᵀ x̃ with P = (g ∘ dY) ρB, and for DropElements, which computes
// only x̃ = dropout(x). Include this file after the target pragma (cpu/target_<isa>.h).
//
// A vector holds neighbouring columns of one row of m, `right` or `acc`. For kRanksTogether ranks at a time, the dot
// products of two rows of m with rows of `right` stay in registers over a panel of kPanel columns, and the sums `acc`
// for two vectors of columns stay in registers over kRows rows. Dropout is applied to a block of kRows x kDroppedPanel
// elements in L1: the block holds mask ∘ m in m's own dtype. The outer loop runs over panels: a panel's columns of
// `right` and `acc`, 2 x kPanel x rank x 4 bytes, stay in L2 for all tokens. row_pass reads m once, in m's own dtype,
// and neither reads nor writes another matrix of m's size. A block of m has a short run of each row, and the hardware
// prefetcher does not predict such runs. Therefore row_pass prefetches the next block of m during the products with the
// present block.
#pragma once

#include <type_traits>

#include "cpu/row_loop.h"
#include "linear/cpu/kernels/row_block.h"

namespace peft_ext {
namespace {

// Largest number of ranks for which row_pass keeps sums in registers at a time.
constexpr int kRanksTogether = Vec::kWidth == 8 ? 4 : 8;

// Computes totals[i] = scale times the sum of the lanes of the vector sums[i].
template <int kCount>
inline void lane_sums(const Vec (&sums)[kCount], float scale, float* totals) {
  for (int i = 0; i < kCount; i += Vec::kWidth) {
    Vec group[Vec::kWidth];
    for (int j = 0; j < Vec::kWidth; ++j) group[j] = i + j < kCount ? sums[i + j] : Vec::zero();
    const Vec found = Vec::mul(Vec::sums_of(group), Vec::broadcast(scale));
    if (i + Vec::kWidth <= kCount) {
      found.store(totals + i);
      continue;
    }
    alignas(64) float lanes[Vec::kWidth];
    found.store(lanes);
    for (int j = 0; i + j < kCount; ++j) totals[i + j] = lanes[j];
  }
}

constexpr int kRows = 16;  // largest number of rows of RowPass::m in a block
// Number of columns in a block if dropout is active. For a 16-bit m and up to 16 ranks, the copy of the block, the
// random draws and the columns of `acc` together fit an L1 cache of 32 KiB.
constexpr int kDroppedPanel = kPanel / 2;

// A block of mask ∘ m, and the random draws for one row of the block.
template <typename T>
struct DroppedBlock {
  alignas(64) T values[kRows][kDroppedPanel];
  alignas(64) uint16_t draws[draws_room(kDroppedPanel)];
};

// Sets the block to mask ∘ m for the rows [t, t + rows) and the columns [k, k + width).
template <typename T>
inline void drop_block(const RowPass& pass, int64_t t, int rows, int64_t k, int64_t width, DroppedBlock<T>* block) {
  for (int i = 0; i < rows; ++i) {
    const int64_t flat = (t + i) * pass.columns + k;
    const uint16_t* draws = philox_draws(pass.dropout, flat, width, block->draws);
    drop_values(pass.dropout, draws, width, static_cast<const T*>(pass.m) + flat, block->values[i]);
    if (pass.keep != nullptr) keep_bits(pass.dropout, draws, width, pass.keep + (t + i) * pass.keep_words + k / 32);
  }
}

void drop_elements(const DropElements& work, int64_t begin, int64_t end) {
  alignas(64) uint16_t buffer[draws_room(kDropTogether)];
  alignas(64) float values[kDropTogether];
  with_dtype(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = begin; i < end; i += kDropTogether) {
      const int64_t count = min_i64(kDropTogether, end - i);
      const uint16_t* draws = philox_draws(work.dropout, i, count, buffer);
      widen(static_cast<const T*>(work.m) + i, count, values);
      apply_dropout(work.dropout, draws, count, values);
      narrow(values, count, static_cast<T*>(work.out) + i);
    }
  });
}

// Makes compilers for x86-64 keep a vector in a register. Without in_register, the compiler would load a weight again
// for every use, or clear sums by memset.
inline Vec in_register(Vec x) {
#if defined(__x86_64__)
  if constexpr (Vec::kWidth > 1) asm("" : "+v"(x.v));
#endif
  return x;
}

// Several rows of m or of a DroppedBlock, `stride` elements apart.
template <typename T>
struct Rows {
  const T* at;
  int64_t stride;
  const T* row(int64_t i) const { return at + i * stride; }
};

// Divides `count` ranks into groups of at most kRanksTogether, and calls run(std::integral_constant<int, n>(), first)
// for each group of n ranks.
template <typename Run>
inline void for_rank_groups(int64_t count, const Run& run) {
  int64_t r = 0;
  for (; r + kRanksTogether <= count; r += kRanksTogether) run(std::integral_constant<int, kRanksTogether>(), r);
  if constexpr (kRanksTogether > 4)
    for (; r + 4 <= count; r += 4) run(std::integral_constant<int, 4>(), r);
  for (; r + 2 <= count; r += 2) run(std::integral_constant<int, 2>(), r);
  for (; r < count; ++r) run(std::integral_constant<int, 1>(), r);
}

// Multiplies kCount rows of m with kRanks rows of `right` over `count` columns, and multiplies the products by `scale`.
// `lanes` is WholeVec, or PartVec for columns that do not fill a vector. The results are added to out[i][q] if `onto`
// is true, and otherwise stored in out[i][q].
template <int kCount, int kRanks, typename V, typename T>
inline void shrink_tile(V lanes, Rows<T> rows, const float* right, int64_t right_stride, int64_t count, float scale,
                        bool onto, float* out, int64_t out_stride) {
  Vec sums[kCount * kRanks];
  for (int i = 0; i < kCount * kRanks; ++i) sums[i] = in_register(Vec::zero());
  for (int64_t j = 0; j < count; j += Vec::kWidth) {
    Vec values[kCount];
    for (int i = 0; i < kCount; ++i) values[i] = lanes.load(rows.row(i) + j);
    for (int q = 0; q < kRanks; ++q) {
      const Vec weight = in_register(lanes.load(right + q * right_stride + j));
      for (int i = 0; i < kCount; ++i) sums[i * kRanks + q] = Vec::fma(values[i], weight, sums[i * kRanks + q]);
    }
  }
  alignas(64) float totals[kCount * kRanks];
  lane_sums(sums, scale, totals);
  for (int i = 0; i < kCount; ++i) {
    float* to = out + i * out_stride;
    if (onto)
      for (int q = 0; q < kRanks; ++q) to[q] += totals[i * kRanks + q];
    else
      for (int q = 0; q < kRanks; ++q) to[q] = totals[i * kRanks + q];
  }
}

// Adds the product of leftᵀ [rank, count] and rows [count, columns] to acc, for kRanks ranks and kVecs vectors of
// columns.
template <int kRanks, int kVecs, typename V, typename T>
inline void outer_tile(V lanes, Rows<T> rows, int count, const float* left, int64_t rank, float* acc,
                       int64_t acc_stride) {
  Vec sums[kRanks][kVecs];
  for (int q = 0; q < kRanks; ++q)
    for (int v = 0; v < kVecs; ++v) sums[q][v] = lanes.load(acc + q * acc_stride + v * Vec::kWidth);
  for (int i = 0; i < count; ++i) {
    Vec values[kVecs];
    for (int v = 0; v < kVecs; ++v) values[v] = lanes.load(rows.row(i) + v * Vec::kWidth);
    for (int q = 0; q < kRanks; ++q) {
      const Vec by = Vec::broadcast(left[i * rank + q]);
      for (int v = 0; v < kVecs; ++v) sums[q][v] = Vec::fma(values[v], by, sums[q][v]);
    }
  }
  for (int q = 0; q < kRanks; ++q)
    for (int v = 0; v < kVecs; ++v) lanes.store(acc + q * acc_stride + v * Vec::kWidth, sums[q][v]);
}

template <typename T>
inline void outer_rows(Rows<T> rows, int count, const float* left, int64_t rank, float* acc, int64_t acc_stride,
                       int64_t width) {
  for_rank_groups(rank, [&](auto ranks, int64_t r) {
    constexpr int kRanks = decltype(ranks)::value;
    const auto tile = [&](auto vecs, auto lanes, int64_t j) {
      outer_tile<kRanks, decltype(vecs)::value>(lanes, Rows<T>{rows.at + j, rows.stride}, count, left + r, rank,
                                                acc + r * acc_stride + j, acc_stride);
    };
    int64_t j = 0;
    for (; j + 2 * Vec::kWidth <= width; j += 2 * Vec::kWidth) tile(std::integral_constant<int, 2>(), WholeVec(), j);
    for (; j + Vec::kWidth <= width; j += Vec::kWidth) tile(std::integral_constant<int, 1>(), WholeVec(), j);
    if (j < width) tile(std::integral_constant<int, 1>(), PartVec{width - j}, j);
  });
}

// The block of m that is multiplied after the present block: `count` rows of `width` columns.
template <typename T>
struct NextBlock {
  Rows<T> rows;
  int count;
  int64_t width;

  // Prefetches the rows [first, last) of this block into L2.
  void fetch(int first, int last) const {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    for (int i = first; i < min_i64(last, count); ++i)
      for (int64_t j = 0; j < width; j += kLine) __builtin_prefetch(rows.row(i) + j, 0, 2);
  }
};

template <typename T>
inline void shrink_rows(Rows<T> rows, int count, const NextBlock<T>& next, const float* right, int64_t right_stride,
                        int64_t rank, int64_t width, float scale, bool onto, float* out) {
  const int64_t whole = width / Vec::kWidth * Vec::kWidth;
  for_rank_groups(rank, [&](auto ranks, int64_t r) {
    constexpr int kRanks = decltype(ranks)::value;
    const auto tile = [&](auto together, int i) {
      constexpr int kCount = decltype(together)::value;
      const float* from = right + r * right_stride;
      float* to = out + i * rank + r;
      if (r == 0) next.fetch(i, i + kCount);  // prefetches a few rows of the next block at a time, during the products
      if (whole > 0)
        shrink_tile<kCount, kRanks>(WholeVec(), Rows<T>{rows.row(i), rows.stride}, from, right_stride, whole, scale,
                                    onto, to, rank);
      if (whole < width)
        shrink_tile<kCount, kRanks>(PartVec{width - whole}, Rows<T>{rows.row(i) + whole, rows.stride}, from + whole,
                                    right_stride, 1, scale, onto || whole > 0, to, rank);
    };
    int i = 0;
    for (; i + 2 <= count; i += 2) tile(std::integral_constant<int, 2>(), i);
    if (i < count) tile(std::integral_constant<int, 1>(), i);
  });
}

template <typename T>
inline void row_block(const RowPass& pass, Rows<T> rows, int count, const NextBlock<T>& next, int64_t t, int64_t k,
                      int64_t width) {
  if (pass.right != nullptr)
    shrink_rows(rows, count, next, pass.right + k, pass.columns, pass.rank, width,
                pass.dropout.active ? pass.dropout.scale : 1.0f, k > 0, pass.out + t * pass.rank);
  else
    next.fetch(0, kRows);
  if (pass.left != nullptr)
    outer_rows(rows, count, pass.left + t * pass.rank, pass.rank, pass.acc + k, pass.acc_stride, width);
  for (int i = 0; i < count && pass.squares != nullptr; ++i) {
    float sum[1];
    sum_vectors(width, sum, [&](auto lanes, int64_t j, Vec* sums) {
      const Vec value = lanes.load(rows.row(i) + j);
      sums[0] = Vec::fma(value, value, sums[0]);
    });
    pass.squares[t + i] = k == 0 ? sum[0] : pass.squares[t + i] + sum[0];
  }
  if (pass.totals != nullptr)
    for_vectors(width, [&](auto lanes, int64_t j) {
      Vec sum = lanes.load(pass.totals + k + j);
      for (int i = 0; i < count; ++i) sum = Vec::add(sum, lanes.load(rows.row(i) + j));
      lanes.store(pass.totals + k + j, sum);
    });
}

template <typename T>
void row_pass_range(const RowPass& pass, int64_t begin, int64_t end, int64_t first, int64_t last) {
  DroppedBlock<T> block;
  const T* m = static_cast<const T*>(pass.m);
  const int64_t panel = pass.dropout.active ? kDroppedPanel : kPanel;
  for (int64_t k = first; k < last; k += panel) {
    const int64_t width = min_i64(panel, last - k);
    for (int64_t t = begin; t < end; t += kRows) {
      const int count = static_cast<int>(min_i64(kRows, end - t));
      Rows<T> rows{m + t * pass.columns + k, pass.columns};
      const bool down = t + kRows < end;
      const int64_t next_t = down ? t + kRows : begin, next_k = down ? k : k + panel;
      const NextBlock<T> next{{m + next_t * pass.columns + next_k, pass.columns},
                              static_cast<int>(min_i64(kRows, end - next_t)),
                              min_i64(panel, last - next_k)};
      if (pass.dropout.active) {
        drop_block(pass, t, count, k, width, &block);
        rows = {block.values[0], kDroppedPanel};
      }
      row_block(pass, rows, count, next, t, k, width);
    }
  }
}

void row_pass(const RowPass& pass, int64_t begin, int64_t end, int64_t first, int64_t last) {
  with_dtype(pass.dtype, [&](auto zero) { row_pass_range<decltype(zero)>(pass, begin, end, first, last); });
}

}  // namespace
}  // namespace peft_ext
