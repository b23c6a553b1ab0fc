// The rows of cross_entropy.h on the path whose Vec is in reach. Included after the target pragma and cpu/simd_<isa>.h.
#pragma once

#include <math.h>
#include <string.h>

#include "cpu/vec_math.h"
#include "cross_entropy/cross_entropy.h"

namespace peft_ext {
namespace {

constexpr int64_t kLanes = Vec::kWidth;
constexpr int64_t kSumBlock = 512;  // elements: a sum of few, and then a sum of those, loses few bits

// f(values, how many of them are there) for each vector of a run; behind the last one zeros are loaded.
template <typename T, typename F>
inline void for_vectors(const T* run, int64_t count, const F& f) {
  int64_t v = 0;
  for (; v + kLanes <= count; v += kLanes) f(Vec::load_as(run + v), kLanes);
  if (v < count) f(Vec::load_as(run + v, count - v), count - v);
}

// The first `count` lanes, the first one behind them.
inline Vec filled(Vec value, int64_t count) {
  float lanes[kLanes];
  value.store(lanes);
  for (int64_t i = count; i < kLanes; ++i) lanes[i] = lanes[0];
  return Vec::load(lanes);
}

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
  // 1 - (z/c)²
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
  for_vectors(row, columns, [&](Vec x, int64_t count) {
    const Vec z = logits.z(x);
    // Of a rest the lanes behind it stand for its first element, which changes no maximum.
    largest = Vec::max(largest, count == kLanes ? z : filled(z, count));
  });
  const float most = largest.largest();
  const Vec shift = Vec::broadcast(most);

  Vec sums = Vec::zero(), totals = Vec::zero();
  for (int64_t block = 0; block < columns; block += kSumBlock) {
    const int64_t end = min_i64(columns, block + kSumBlock);
    Vec some = Vec::zero(), total = Vec::zero();
    for_vectors(row + block, end - block, [&](Vec x, int64_t count) {
      const Vec z = logits.z(x), e = vec_exp(Vec::sub(z, shift));
      some = Vec::add(some, count == kLanes ? e : e.first(count));
      total = Vec::add(total, count == kLanes ? z : z.first(count));
    });
    sums = Vec::add(sums, some), totals = Vec::add(totals, total);
  }
  const float sum = sums.sum(), smooth = work.smoothing, rest = 1.0f - smooth;

  float at_label[kLanes];
  const Vec z_label = logits.z(Vec::broadcast(to_float(row[label])));
  z_label.store(at_label);
  // Differences to the largest: of lse = most + log Σ itself, a large one would leave few bits of the logarithm.
  loss = rest * (logf(sum) - (at_label[0] - most));
  if (smooth != 0.0f) loss += smooth * (logf(sum) - (totals.sum() / static_cast<float>(columns) - most));
  if (!work.needs_grad) return;

  const Vec share = Vec::broadcast(1.0f / sum), even = Vec::broadcast(smooth / static_cast<float>(columns));
  const Vec by = Vec::broadcast(weight * work.scale);
  const auto gradient = [&](Vec z, Vec less) {
    const Vec d = Vec::mul(by, Vec::sub(Vec::mul(vec_exp(Vec::sub(z, shift)), share), less));
    return kSoftcap ? Vec::mul(d, logits.slope(z)) : d;
  };
  gradient(z_label, Vec::add(even, Vec::broadcast(rest))).store(at_label);
  int64_t v = 0;
  for (; v + kLanes <= columns; v += kLanes) gradient(logits.z(Vec::load_as(row + v)), even).store_as(row + v);
  if (v < columns) gradient(logits.z(Vec::load_as(row + v, columns - v)), even).store_as(row + v, columns - v);
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
  const bool caps = work.softcap > 0.0f;
  switch (work.dtype) {
    case DType::kF32:
      return caps ? cross_entropy_rows<float, true>(work, begin, end)
                  : cross_entropy_rows<float, false>(work, begin, end);
    case DType::kBF16:
      return caps ? cross_entropy_rows<bf16, true>(work, begin, end)
                  : cross_entropy_rows<bf16, false>(work, begin, end);
    case DType::kF16:
      return caps ? cross_entropy_rows<f16, true>(work, begin, end) : cross_entropy_rows<f16, false>(work, begin, end);
  }
}

}  // namespace
}  // namespace peft_ext
