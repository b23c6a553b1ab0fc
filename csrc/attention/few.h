// Computes the forward of attention for few queries, as in generation: O and lse, defined in attention/kernels.h. A
// unit of a thread's work has up to kFewRows rows; a row is one query of one of the query heads that share a key head.
// A thread reads k and v in place, once for all rows of a unit, and holds the scores and probabilities of the rows in
// float32. Include this file after the headers that attention/kernels_impl.h lists.
#pragma once

#include "attention/forward.h"

namespace peft_ext {
namespace {

constexpr int64_t kFewKeys = 256;  // number of keys whose terms are added to O while O's sums are in registers
constexpr int kFewVecs = 4;        // number of vectors of a row of O whose sums are in registers at a time

struct FewParts {
  float *q, *p, *o;
  FewParts(Parts* parts, const Attention& work)
      : q(parts->take<float>(kFewRows * padded_lanes(work.size))),
        p(parts->take<float>(kFewRows * padded_lanes(work.keys))),
        o(parts->take<float>(kFewRows * padded_lanes(work.value_size))) {}
};

inline bool sees(const Attention& work, int64_t batch, int64_t head, int64_t query, int64_t key) {
  if (work.causal && key > query) return false;
  return work.seen == nullptr ||
         work.seen[batch * work.seen_batch + head * work.seen_head + query * work.seen_query + key * work.seen_key] !=
             0;
}

// Computes out and lse for the rows [row, row + kRowsOfUnit) of the H / Hkv · T rows (query head, query) of a key head.
template <typename T, int kRowsOfUnit>
void few_rows(const Attention& work, int64_t batch, int64_t kv_head, int64_t row, Parts parts) {
  const FewParts own(&parts, work);
  const int64_t group = work.heads / work.kv_heads, depth = padded_lanes(work.size);
  const int64_t keys = padded_lanes(work.keys), columns = padded_lanes(work.value_size);
  int64_t head[kRowsOfUnit], query[kRowsOfUnit];
  for (int r = 0; r < kRowsOfUnit; ++r) {
    head[r] = kv_head * group + (row + r) / work.queries;
    query[r] = (row + r) % work.queries;
    const T* from = head_of<const T>(work.q, batch, head[r], query[r]);
    float* to = own.q + r * depth;
    for (int64_t d = work.size; d < depth; ++d) to[d] = 0.0f;
    for_vectors(work.size, [&](auto lanes, int64_t d) { lanes.store(to + d, lanes.load(from + d)); });
  }
  for (int64_t j = 0; j < work.keys; ++j) {
    const T* key = head_of<const T>(work.k, batch, kv_head, j);
    Vec sums[kRowsOfUnit];
    for (int r = 0; r < kRowsOfUnit; ++r) sums[r] = Vec::zero();
    for_vectors(work.size, [&](auto lanes, int64_t d) {
      const Vec x = lanes.load(key + d);
      for (int r = 0; r < kRowsOfUnit; ++r) sums[r] = Vec::fma(x, Vec::load(own.q + r * depth + d), sums[r]);
    });
    for (int r = 0; r < kRowsOfUnit; ++r) own.p[r * keys + j] = sums[r].sum();
  }
  float factor[kRowsOfUnit];
  for (int r = 0; r < kRowsOfUnit; ++r) {
    float* p = own.p + r * keys;
    const bool hides = work.causal || work.seen != nullptr;
    for (int64_t j = 0; hides && j < work.keys; ++j)
      if (!sees(work, batch, head[r], query[r], j)) p[j] = -INFINITY;
    Vec most = Vec::broadcast(-INFINITY);
    for_vectors(work.keys, [&](auto lanes, int64_t j) { most = Vec::max(most, lanes.filled(lanes.load(p + j))); });
    const float largest = most.largest();
    const Vec from = Vec::broadcast(largest), by = Vec::broadcast(work.scale * kLog2E);
    for_vectors(work.keys, [&](auto lanes, int64_t j) {
      lanes.store(p + j, vec_exp2(Vec::mul(Vec::sub(lanes.load(p + j), from), by)));
    });
    for (int64_t j = 0; hides && j < work.keys; ++j)
      if (!sees(work, batch, head[r], query[r], j)) p[j] = 0.0f;
    float sum[1];
    sum_vectors<1>(work.keys, sum,
                   [&](auto lanes, int64_t j, Vec* sums) { sums[0] = Vec::add(sums[0], lanes.load(p + j)); });
    const bool any = (sum[0] > 0.0f || sum[0] != sum[0]) && largest != -INFINITY;
    work.lse[(batch * work.heads + head[r]) * work.queries + query[r]] =
        any ? largest * work.scale + logf(sum[0]) : 0.0f;
    factor[r] = any ? 1.0f / sum[0] : 0.0f;
    for (int64_t j = 0; !any && j < work.keys; ++j) p[j] = 0.0f;
  }
  for (int64_t i = 0; i < kRowsOfUnit * columns; ++i) own.o[i] = 0.0f;
  for (int64_t k0 = 0; k0 < work.keys; k0 += kFewKeys) {
    const int64_t until = min_i64(k0 + kFewKeys, work.keys);
    const auto add = [&](auto lanes, auto count, int64_t d) {
      constexpr int kCount = decltype(count)::value;
      Vec sums[kRowsOfUnit][kCount];
      for (int r = 0; r < kRowsOfUnit; ++r)
        for (int i = 0; i < kCount; ++i) sums[r][i] = Vec::load(own.o + r * columns + d + i * kWidth);
      for (int64_t j = k0; j < until; ++j) {
        const T* value = head_of<const T>(work.v, batch, kv_head, j) + d;
        Vec x[kCount];
        for (int i = 0; i < kCount; ++i) x[i] = lanes.load(value + i * kWidth);
        for (int r = 0; r < kRowsOfUnit; ++r) {
          const Vec p = Vec::broadcast(own.p[r * keys + j]);
          for (int i = 0; i < kCount; ++i) sums[r][i] = Vec::fma(p, x[i], sums[r][i]);
        }
      }
      for (int r = 0; r < kRowsOfUnit; ++r)
        for (int i = 0; i < kCount; ++i) sums[r][i].store(own.o + r * columns + d + i * kWidth);
    };
    int64_t d = 0;
    for (; d + kFewVecs * kWidth <= work.value_size; d += kFewVecs * kWidth)
      add(WholeVec(), std::integral_constant<int, kFewVecs>(), d);
    for (; d + kWidth <= work.value_size; d += kWidth) add(WholeVec(), std::integral_constant<int, 1>(), d);
    if (d < work.value_size) add(PartVec{work.value_size - d}, std::integral_constant<int, 1>(), d);
  }
  for (int r = 0; r < kRowsOfUnit; ++r) {
    T* to = head_of<T>(work.out, batch, head[r], query[r]);
    const Vec by = Vec::broadcast(factor[r]);
    for_vectors(work.value_size,
                [&](auto lanes, int64_t d) { lanes.store(to + d, Vec::mul(Vec::load(own.o + r * columns + d), by)); });
  }
}

template <typename T>
void few_units(const Attention& work, int64_t begin, int64_t end, void* scratch) {
  const int64_t rows = work.heads / work.kv_heads * work.queries, units = ceil_div(rows, kFewRows);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / (work.kv_heads * units), kv_head = unit / units % work.kv_heads;
    const int64_t row = unit % units * kFewRows;
    const Parts parts{reinterpret_cast<uintptr_t>(scratch)};
    switch (min_i64(kFewRows, rows - row)) {
      case 4:
        few_rows<T, 4>(work, batch, kv_head, row, parts);
        break;
      case 3:
        few_rows<T, 3>(work, batch, kv_head, row, parts);
        break;
      case 2:
        few_rows<T, 2>(work, batch, kv_head, row, parts);
        break;
      default:
        few_rows<T, 1>(work, batch, kv_head, row, parts);
    }
  }
}

}  // namespace
}  // namespace peft_ext
