// Computes the forward of attention for a block of queries: O and lse, defined in attention/kernels.h. Include this
// file after the headers that attention/kernels_impl.h lists.
#pragma once

#include <math.h>

#include "attention/seen.h"
#include "cpu/vec_math.h"

namespace peft_ext {
namespace {

constexpr int64_t kForwardKeys = 192;  // number of keys that the forward multiplies at a time; a multiple of kRows
constexpr float kLog2E = 1.44269504f;

struct ForwardParts {
  Element *rows, *q, *p;
  float *s, *o, *fresh, *turned, *largest, *sum, *change, *bias;
  ForwardParts(Parts* parts, const Attention& work)
      : rows(parts->take<Element>(kQueries * padded_depth(work.size))),
        q(parts->take<Element>(padded_depth(work.size) * kQueries)),
        p(parts->take<Element>(kForwardKeys * kQueries)),
        s(parts->take<float>(kForwardKeys * kQueries)),
        o(parts->take<float>(work.value_size * kQueries)),
        fresh(parts->take<float>(work.value_size * kQueries)),
        turned(parts->take<float>(kQueries * work.value_size)),
        largest(parts->take<float>(kQueries)),
        sum(parts->take<float>(kQueries)),
        change(parts->take<float>(kQueries)),
        bias(parts->take<float>(work.bias ? kQueries * kForwardKeys : 0)) {}
};

// Updates the largest score of each query with the scores [count, 64] of a block of keys, and sets the scores of
// invisible keys to -inf. The scores in memory are S / scale, with S as in attention/kernels.h. Computes for each query
// the factor `change`, by which the sums over the earlier blocks of keys must be multiplied.
inline void take_largest(const uint64_t* bits, int64_t count, int64_t vecs, float scale, const ForwardParts& own) {
  const Vec nothing = Vec::broadcast(-INFINITY);
  for (int64_t v = 0; v < vecs; ++v) {
    const Vec before = Vec::load(own.largest + v * kWidth);
    Vec most = before;
    for (int64_t r = 0; r < count; ++r) {
      float* at = own.s + r * kQueries + v * kWidth;
      Vec s = Vec::load(at);
      if (!all_see(bits[r])) {
        s = Vec::where(bits_at(bits[r], v), s, nothing);
        s.store(at);
      }
      most = Vec::max(most, s);
    }
    most.store(own.largest + v * kWidth);
    // If no key of the earlier blocks was visible, the sums of these blocks are zeros, and any value of `change` is
    // right.
    const Vec far = Vec::broadcast(-3e38f);
    const Vec fell = Vec::sub(Vec::max(before, far), Vec::max(most, far));
    vec_exp2(Vec::mul(fell, Vec::broadcast(scale * kLog2E))).store(own.change + v * kWidth);
  }
}

// Writes P = exp(S - largest S) of a block of keys, with dropout, as a right operand, and adds the sums of P without
// dropout to the sums over the earlier blocks of keys. The terms P of a block of keys are added to each other first,
// because a single term that is added to the sum of a hundred thousand keys would lose almost all of its bits.
inline void take_exponentials(const uint64_t* bits, const uint64_t* keeps, int64_t count, int64_t vecs, float scale,
                              bool first, const ForwardParts& own) {
  for (int64_t v = 0; v < vecs; ++v) {
    const Vec factor = Vec::broadcast(scale * kLog2E), zero = Vec::zero();
    const Vec most = Vec::max(Vec::load(own.largest + v * kWidth), Vec::broadcast(-3e38f));
    Vec sum = zero;
    for (int64_t r = 0; r < padded_depth(count); r += kWord) {
      Vec p[kWord];
      for (int64_t i = 0; i < kWord; ++i) {
        p[i] = zero;
        if (r + i >= count) continue;
        // The largest score is subtracted before the product with the scale, so that the exponent of the largest score
        // is exactly 0.
        p[i] = vec_exp2(Vec::mul(Vec::sub(Vec::load(own.s + (r + i) * kQueries + v * kWidth), most), factor));
        if (!all_see(bits[r + i])) p[i] = Vec::where(bits_at(bits[r + i], v), p[i], zero);
        sum = Vec::add(sum, p[i]);
        if (!all_see(keeps[r + i])) p[i] = Vec::where(bits_at(keeps[r + i], v), p[i], zero);
      }
      store_right(p, own.p + r * kQueries + v * kWidth * kWord);
    }
    if (!first) sum = Vec::fma(Vec::load(own.sum + v * kWidth), Vec::load(own.change + v * kWidth), sum);
    sum.store(own.sum + v * kWidth);
  }
}

template <typename T>
void forward_block(const Attention& work, int64_t batch, int64_t head, int64_t query, Parts parts) {
  const ForwardParts own(&parts, work);
  const int64_t group = work.heads / work.kv_heads, unit = batch * work.kv_heads + head / group;
  const int64_t count = min_i64(kQueries, work.queries - query), vecs = ceil_div(count, kWidth);
  const Left keys = whole_rows(work.k, work.key_rows, batch, head / group, unit, work.keys, work.size);
  const Left values = whole_columns(work.value_columns, unit, work.keys, work.value_size);
  const uint64_t* mask = mask_of(work, batch, head);
  turn_rows(rows_of_heads(head_of<const T>(work.q, batch, head, query), work.q.token, count, work.size, own.rows),
            count, work.size, kQueries, own.q);
  for (int64_t i = 0; i < kQueries; ++i) {
    own.largest[i] = -INFINITY;
    own.sum[i] = 0.0f;
  }
  bool first = true;
  const int64_t until = keys_until(work, query, count);
  for (int64_t k0 = 0; k0 < until; k0 += kForwardKeys) {
    const int64_t here = min_i64(kForwardKeys, until - k0);
    uint64_t bits[kForwardKeys], keeps[kForwardKeys], any = 0;
    for (int64_t r = 0; r < here; ++r) any |= bits[r] = seen(work, mask, k0 + r, query, count);
    if (any == 0) continue;
    kept(work, batch, head, k0, here, query, count, bits, keeps);
    const bool begun = begin_scores(work, batch, head, query, count, k0, here, own.bias, own.s);
    for (int64_t r = 0; r < here; r += kRows) {
      const int64_t rows = min_i64(kRows, here - r), v0 = first_vec(work, k0 + r, query);
      if (!any_sees(bits + r, rows)) continue;
      multiply(rows, vecs - v0, keys.part(k0 + r, 0), own.q + v0 * kWidth * kWord, kQueries * kWord,
               words_of_depth(work.size), own.s + r * kQueries + v0 * kWidth, kQueries, begun);
    }
    take_largest(bits, here, vecs, work.scale, own);
    take_exponentials(bits, keeps, here, vecs, work.scale, first, own);
    multiply_seen(work, k0, here, query, work.value_size, vecs, values, own.p, first ? own.o : own.fresh, false);
    if (!first)
      for (int64_t d = 0; d < work.value_size; ++d)
        for (int64_t v = 0; v < vecs; ++v) {
          const int64_t at = d * kQueries + v * kWidth;
          Vec::fma(Vec::load(own.o + at), Vec::load(own.change + v * kWidth), Vec::load(own.fresh + at))
              .store(own.o + at);
        }
    first = false;
  }
  float* lse = work.lse + (batch * work.heads + head) * work.queries + query;
  for (int64_t i = 0; i < count; ++i) {
    // The condition also tests `largest`: if a bias of -inf gives all visible keys the score -inf, the sum is close to
    // zero but not 0, because vec_exp2 returns at least 2^-126.
    const bool sees = (own.sum[i] > 0.0f || own.sum[i] != own.sum[i]) && own.largest[i] != -INFINITY;
    lse[i] = sees ? own.largest[i] * work.scale + logf(own.sum[i]) : 0.0f;
    own.change[i] = sees ? work.dropout.scale / own.sum[i] : 0.0f;
  }
  if (first) memset(own.o, 0, static_cast<size_t>(work.value_size * kQueries) * sizeof(float));
  store_turned(own.o, work.value_size, count, own.turned, head_of<T>(work.out, batch, head, query), work.out.token,
               [&](int64_t i) { return own.change[i]; });
}

}  // namespace
}  // namespace peft_ext
