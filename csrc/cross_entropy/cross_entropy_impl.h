// The cross-entropy kernel of cross_entropy.h for one instruction set. Include this file after the target pragma
// (cpu/target_<isa>.h) and Vec (cpu/simd_<isa>.h).
#pragma once

#include <math.h>
#include <string.h>

#include "cpu/row_loop.h"
#include "cpu/vec_math.h"
#include "cross_entropy/cross_entropy.h"

namespace peft_ext {
namespace {

// Number of a row's columns in a partial sum. Short partial sums lose fewer bits than one long sum.
constexpr int64_t kSumBlock = 2048;

template <bool kSoftcap>
struct Logits {
  Vec scale, softcap, over_softcap;
  explicit Logits(const CrossEntropy& work)
      : scale(Vec::broadcast(kSoftcap ? work.scale / work.softcap : work.scale)),
        softcap(Vec::broadcast(work.softcap)),
        over_softcap(Vec::broadcast(kSoftcap ? 1.0f / work.softcap : 0.0f)) {}
  Vec z(Vec x) const {
    const Vec scaled = Vec::mul(x, scale);
    return kSoftcap ? Vec::mul(softcap, vec_tanh(scaled)) : scaled;
  }
  // Returns the derivative of the softcap, 1 - (z/c)².
  Vec slope(Vec z) const {
    const Vec t = Vec::mul(z, over_softcap);
    return Vec::fma(Vec::sub(Vec::zero(), t), t, Vec::broadcast(1.0f));
  }
};

template <typename T, bool kSoftcap>
void cross_entropy_row(const CrossEntropy& work, T* row, int64_t label, float weight, float& loss) {
  const Logits<kSoftcap> logits(work);
  const int64_t columns = work.columns;
  Vec largest = Vec::broadcast(-INFINITY);
  for_vectors(columns, [&](auto lanes, int64_t v) {
    // `filled` sets the missing lanes to an element of the row, which does not change the maximum.
    largest = Vec::max(largest, lanes.filled(logits.z(lanes.load(row + v))));
  });
  const float most = largest.largest();
  const Vec shift = Vec::broadcast(most);

  float sum = 0.0f, total = 0.0f;  // sums over the row of e^(z - most) and of z
  for (int64_t block = 0; block < columns; block += kSumBlock) {
    float some[2];
    sum_vectors(min_i64(kSumBlock, columns - block), some, [&](auto lanes, int64_t v, Vec(&sums)[2]) {
      const Vec z = logits.z(lanes.load(row + block + v));
      sums[0] = Vec::add(lanes.only(vec_exp(Vec::sub(z, shift))), sums[0]);
      sums[1] = Vec::add(lanes.only(z), sums[1]);
    });
    sum += some[0], total += some[1];
  }
  const float smooth = work.smoothing, rest = 1.0f - smooth;

  float at_label[Vec::kWidth];
  const Vec z_label = logits.z(Vec::broadcast(to_float(row[label])));
  z_label.store(at_label);
  // The largest z is subtracted from z_label before log Σ is added: the sum lse = most + log Σ would lose bits of the
  // logarithm if `most` is large.
  loss = rest * (logf(sum) - (at_label[0] - most));
  if (smooth != 0.0f) loss += smooth * (logf(sum) - (total / static_cast<float>(columns) - most));
  if (!work.needs_grad) return;

  const Vec share = Vec::broadcast(1.0f / sum), even = Vec::broadcast(smooth / static_cast<float>(columns));
  const Vec by = Vec::broadcast(weight * work.scale);
  const auto gradient = [&](Vec z, Vec less) {
    const Vec d = Vec::mul(by, Vec::sub(Vec::mul(vec_exp(Vec::sub(z, shift)), share), less));
    return kSoftcap ? Vec::mul(d, logits.slope(z)) : d;
  };
  gradient(z_label, Vec::add(even, Vec::broadcast(rest))).store(at_label);
  for_vectors(columns,
              [&](auto lanes, int64_t v) { lanes.store(row + v, gradient(logits.z(lanes.load(row + v)), even)); });
  row[label] = from_float<T>(at_label[0]);
}

template <typename T, bool kSoftcap>
void cross_entropy_rows(const CrossEntropy& work, int64_t begin, int64_t end) {
  T* logits = static_cast<T*>(work.logits);
  for (int64_t t = begin; t < end; ++t) {
    T* row = logits + t * work.columns;
    if (work.labels[t] == work.ignored) {
      work.losses[t] = 0.0f;
      if (work.needs_grad) memset(static_cast<void*>(row), 0, static_cast<size_t>(work.columns) * sizeof(T));
      continue;
    }
    const float weight = work.row_weight == nullptr ? 1.0f : work.row_weight[t];
    cross_entropy_row<T, kSoftcap>(work, row, work.labels[t], weight, work.losses[t]);
  }
}

void rows(const CrossEntropy& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    work.softcap > 0.0f ? cross_entropy_rows<T, true>(work, begin, end)
                        : cross_entropy_rows<T, false>(work, begin, end);
  });
}

}  // namespace
}  // namespace peft_ext
