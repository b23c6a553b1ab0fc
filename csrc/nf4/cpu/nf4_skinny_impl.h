// Computes the skinny product y[t, n] = sum_k x[t, k] w[n, k] of few tokens with an NF4 weight, in code over the type
// Vec. A file that includes this file after the target pragma must define:
//
//   struct Table;
//     Holds the 16 values of an NF4 block in registers.
//   Table make_table(float absmax, DType dtype);
//     Returns the 16 values of an NF4 block with the scale absmax, rounded to dtype, as float32.
//   void decode(const uint8_t* packed, const Table& table, Vec* w);
//     Decodes kSkinnyStep packed NF4 codes to float32 values in w.
//
// For each group of up to 8 tokens that for_token_groups makes, a step of a row of w is decoded in registers and
// multiplied with every token of the group before the next step is read. The kernel reads W once for each group of
// tokens, half a byte per element and the scales, and never writes a decoded weight to memory. One thread computes
// whole rows of w, so that the order of a sum is the same for every number of threads. Sums are float32.
#pragma once

#include "nf4/cpu/nf4_kernels.h"
#include "cpu/token_groups.h"

namespace peft_ext {
namespace {

constexpr int kStepVecs = static_cast<int>(kSkinnyStep) / Vec::kWidth;

template <int kTokens>
void skinny_rows(const Nf4Skinny& work, int64_t begin, int64_t end, int64_t first_token) {
  // Each addition to a sum must wait for the previous addition, so that several sums for each token keep the multiplier
  // busy if there are few tokens.
  constexpr int kSums = kTokens >= 4 ? 1 : kStepVecs < 4 ? kStepVecs : 4;
  const int64_t k = work.columns;
  const int64_t first_block = begin * k >> work.block_shift;
  const float* x = work.x + first_token * k;
  for (int64_t n = begin; n < end; ++n) {
    Vec sums[kTokens][kSums];
    for (int t = 0; t < kTokens; ++t)
      for (int s = 0; s < kSums; ++s) sums[t][s] = Vec::zero();
    Table table;
    int64_t block = -1;
    for (int64_t j = 0; j < k; j += kSkinnyStep) {
      const int64_t flat = n * k + j;
      if ((flat >> work.block_shift) != block) {
        block = flat >> work.block_shift;
        table = make_table(work.absmax[block - first_block], work.dtype);
      }
      Vec w[kStepVecs];
      decode(work.packed + flat / 2, table, w);
      for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kStepVecs; ++v)
          sums[t][v % kSums] = Vec::fma(w[v], Vec::load(x + t * k + j + v * Vec::kWidth), sums[t][v % kSums]);
    }
    for (int t = 0; t < kTokens; ++t) {
      alignas(64) float lanes[Vec::kWidth];
      float total = 0.0f;
      for (int s = 0; s < kSums; ++s) {
        sums[t][s].store(lanes);
        for (int i = 0; i < Vec::kWidth; ++i) total += lanes[i];
      }
      work.y[(first_token + t) * work.rows + n] = total;
    }
  }
}

void skinny(const Nf4Skinny& work, int64_t begin, int64_t end) {
  for_token_groups(work.tokens,
                   [&](auto tokens, int64_t first) { skinny_rows<decltype(tokens)::kCount>(work, begin, end, first); });
}

}  // namespace
}  // namespace peft_ext
