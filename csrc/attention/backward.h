// Computes the backward of attention for one cell of queries and keys: dV, dQ and dK, defined in attention/kernels.h.
// Include this file after the headers that attention/kernels_impl.h lists.
#pragma once

#include "attention/forward.h"

namespace peft_ext {
namespace {

constexpr int64_t kBackwardKeys = kLeastStep * kPlanBlock;  // number of keys that the backward multiplies at a time

struct BackwardParts {
  Element *q_rows, *grad_rows;      // copies of rows of q and dO, unless the products read q and dO in place
  Element *q_turned, *grad_turned;  // q and dO as right operands whose depth is the head size
  Element *q_joined, *grad_joined;  // q and dO as right operands whose depth is the queries
  Element *p, *ds, *ds_joined;      // p, ds: left operands whose depth is the queries; ds_joined: dS as right operand
  float *s, *dp, *turned, *delta, *bias;
  BackwardParts(Parts* parts, const Attention& work)
      : q_rows(parts->take<Element>(kQueries * padded_depth(work.size))),
        grad_rows(parts->take<Element>(kQueries * padded_depth(work.value_size))),
        q_turned(parts->take<Element>(padded_depth(work.size) * kQueries)),
        grad_turned(parts->take<Element>(padded_depth(work.value_size) * kQueries)),
        q_joined(parts->take<Element>(kQueries * padded_lanes(work.size))),
        grad_joined(parts->take<Element>(kQueries * padded_lanes(work.value_size))),
        p(parts->take<Element>(kBackwardKeys * kQueries)),
        ds(parts->take<Element>(kBackwardKeys * kQueries)),
        ds_joined(parts->take<Element>(kBackwardKeys * kQueries)),
        s(parts->take<float>(kBackwardKeys * kQueries)),
        dp(parts->take<float>(kBackwardKeys * kQueries)),
        turned(parts->take<float>(kQueries * work.size)),
        delta(parts->take<float>(kQueries)),
        bias(parts->take<float>(work.bias ? kQueries * kBackwardKeys : 0)) {}
};

// Returns the dot product Σ a ∘ b of two rows.
template <typename T>
inline float dot(const T* a, const T* b, int64_t columns) {
  float total[1];
  sum_vectors<1>(columns, total, [&](auto lanes, int64_t i, Vec* sums) {
    sums[0] = Vec::fma(lanes.load(a + i), lanes.load(b + i), sums[0]);
  });
  return total[0];
}

// Computes dS, and P with zeros where dropout drops a key, for a block of keys from S and dP = dO Vᵀ. Where no query of
// a vector of queries may see a key, ds_joined is set to zero.
inline void take_gradients(const Attention& work, const uint64_t* bits, const uint64_t* keeps, const int64_t* first,
                           int64_t count, int64_t vecs, const float* lse, const BackwardParts& own) {
  const Vec factor = Vec::broadcast(work.scale * kLog2E), zero = Vec::zero();
  for (int64_t v = 0; v < vecs; ++v) {
    const Vec shift = Vec::mul(Vec::load(lse + v * kWidth), Vec::broadcast(-kLog2E));
    const Vec delta = Vec::load(own.delta + v * kWidth);
    for (int64_t r = 0; r < padded_depth(count); r += kWord) {
      Vec ds[kWord];
      for (int64_t i = 0; i < kWord; ++i) {
        ds[i] = zero;
        if (r + i >= count || v < first[(r + i) / kRows]) continue;
        const int64_t at = (r + i) * kQueries + v * kWidth;
        // The minimum limits P to 1. Without the minimum, P would exceed 1 for some invisible keys, and for visible
        // keys by the rounding of lse.
        Vec p = vec_exp2(Vec::min(zero, Vec::fma(Vec::load(own.s + at), factor, shift)));
        if (!all_see(bits[r + i])) p = Vec::where(bits_at(bits[r + i], v), p, zero);
        Vec dp = Vec::load(own.dp + at), kept = p;
        if (work.dropout.active) {
          dp = Vec::where(bits_at(keeps[r + i], v), Vec::mul(dp, Vec::broadcast(work.dropout.scale)), zero);
          kept = Vec::where(bits_at(keeps[r + i], v), p, zero);
        }
        ds[i] = Vec::mul(p, Vec::sub(dp, delta));
        const int64_t index = left_index(r + i, v * kWidth, kLeftRows * kQueries);
        store_left(kept, own.p + index);
        store_left(ds[i], own.ds + index);
      }
      store_right(ds, own.ds_joined + r * kQueries + v * kWidth * kWord);
    }
  }
}

// Adds the terms of the keys [key, key_end) and of a block of queries to the sums of dQ (query_sums), dK (key_sums) and
// dV (value_sums), one block of keys after another. If `first`, query_sums is written without being read. If `last`,
// grad_q is written from query_sums.
template <typename T>
void backward_block(const Attention& work, int64_t batch, int64_t head, int64_t query, int64_t key, int64_t key_end,
                    bool first, bool last, float* key_sums, float* value_sums, float* query_sums, Parts parts) {
  const BackwardParts own(&parts, work);
  const int64_t group = work.heads / work.kv_heads, unit = batch * work.kv_heads + head / group;
  const int64_t count = min_i64(kQueries, work.queries - query);
  const int64_t vecs = ceil_div(padded_depth(count), kWidth);  // P and dS are zero for the queries beyond `count`
  const int64_t size = work.size, value_size = work.value_size;
  const int64_t lanes = padded_lanes(size), value_lanes = padded_lanes(value_size);
  const Left keys = whole_rows(work.k, work.key_rows, batch, head / group, unit, work.keys, size);
  const Left values = whole_rows(work.v, work.value_rows, batch, head / group, unit, work.keys, value_size);
  const Left key_columns = whole_columns(work.key_columns, unit, work.keys, size);
  const uint64_t* mask = mask_of(work, batch, head);

  const T* grad_at = head_of<const T>(work.grad, batch, head, query);
  const T* out_at = head_of<const T>(work.out, batch, head, query);
  const Rows q = rows_of_heads(head_of<const T>(work.q, batch, head, query), work.q.token, count, size, own.q_rows);
  const Rows grad = rows_of_heads(grad_at, work.grad.token, count, value_size, own.grad_rows);
  turn_rows(q, count, size, kQueries, own.q_turned);
  turn_rows(grad, count, value_size, kQueries, own.grad_turned);
  join_all(q, count, size, own.q_joined);
  join_all(grad, count, value_size, own.grad_joined);
  float lse[kQueries];
  for (int64_t i = 0; i < kQueries; ++i) {
    lse[i] = i < count ? work.lse[(batch * work.heads + head) * work.queries + query + i] : 0.0f;
    own.delta[i] = i < count ? dot(grad_at + i * work.grad.token, out_at + i * work.out.token, value_size) : 0.0f;
  }

  const int64_t until = min_i64(key_end, keys_until(work, query, count)), steps = words_of_depth(count);
  // The first key of every cell is a multiple of kBackwardKeys, so that every plan has the same blocks of keys.
  for (int64_t k0 = key; k0 < until; k0 += kBackwardKeys) {
    const int64_t here = min_i64(kBackwardKeys, until - k0);
    uint64_t bits[kBackwardKeys], keeps[kBackwardKeys], any = 0;
    for (int64_t r = 0; r < here; ++r) any |= bits[r] = seen(work, mask, k0 + r, query, count);
    if (any == 0) continue;
    kept(work, batch, head, k0, here, query, count, bits, keeps);
    // starts[i]: for strip i of kRows keys, the first vector of queries to multiply, or `vecs` if no query may see a
    // key of the strip.
    int64_t starts[(kBackwardKeys + kRows - 1) / kRows];
    const auto for_strips = [&](auto f) {
      for (int64_t r = 0; r < here; r += kRows)
        if (const int64_t v0 = starts[r / kRows]; v0 < vecs) f(r, min_i64(kRows, here - r), v0, v0 * kWidth);
    };
    for (int64_t r = 0; r < here; r += kRows)
      starts[r / kRows] = any_sees(bits + r, min_i64(kRows, here - r)) ? first_vec(work, k0 + r, query) : vecs;
    const bool begun = begin_scores(work, batch, head, query, count, k0, here, own.bias, own.s);
    for_strips([&](int64_t r, int64_t rows, int64_t v0, int64_t lane) {
      multiply(rows, vecs - v0, keys.part(k0 + r, 0), own.q_turned + lane * kWord, kQueries * kWord,
               words_of_depth(size), own.s + r * kQueries + lane, kQueries, begun);
    });
    for_strips([&](int64_t r, int64_t rows, int64_t v0, int64_t lane) {
      multiply(rows, vecs - v0, values.part(k0 + r, 0), own.grad_turned + lane * kWord, kQueries * kWord,
               words_of_depth(value_size), own.dp + r * kQueries + lane, kQueries, false);
    });
    take_gradients(work, bits, keeps, starts, here, vecs, lse, own);
    const Left p{own.p, kLeftRows * kQueries}, ds{own.ds, kLeftRows * kQueries};
    for_strips([&](int64_t r, int64_t rows, int64_t, int64_t lane) {
      multiply(rows, value_lanes / kWidth, p.part(r, lane), own.grad_joined + lane * value_lanes, value_lanes * kWord,
               steps - lane / kWord, value_sums + (k0 + r) * value_lanes, value_lanes, true);
    });
    for_strips([&](int64_t r, int64_t rows, int64_t, int64_t lane) {
      multiply(rows, lanes / kWidth, ds.part(r, lane), own.q_joined + lane * lanes, lanes * kWord, steps - lane / kWord,
               key_sums + (k0 + r) * lanes, lanes, true);
    });
    multiply_seen(work, k0, here, query, size, vecs, key_columns, own.ds_joined, query_sums, !first);
    first = false;
  }
  if (first) memset(query_sums, 0, static_cast<size_t>(size * kQueries) * sizeof(float));
  if (!last) return;
  store_turned(query_sums, size, count, own.turned, head_of<T>(work.grad_q, batch, head, query), work.grad_q.token,
               [&](int64_t) { return work.scale; });
}

template <typename T>
void backward_cell(const Attention& work, const BackwardCell& cell, void* scratch) {
  const int64_t group = work.heads / work.kv_heads, units = work.batches * work.kv_heads;
  const int64_t unit = cell.stream / work.splits, split = cell.stream % work.splits;
  const int64_t head = unit % work.kv_heads * group + split * (group / work.splits) + cell.head;
  float* key_sums = work.key_sums + (split * units + unit) * work.keys * padded_lanes(work.size);
  float* value_sums = work.value_sums + (split * units + unit) * work.keys * padded_lanes(work.value_size);
  const int64_t blocks = ceil_div(work.queries, kQueries), key_end = min_i64(work.keys, cell.key_end * kPlanBlock);
  if (cell.head == 0 && cell.query_end == blocks) clear_sums(work, unit, split, cell.key * kPlanBlock, key_end);
  Parts parts{reinterpret_cast<uintptr_t>(scratch)};
  float* own_sums = parts.take<float>(work.size * kQueries);
  for (int64_t block = cell.query_end - 1; block >= cell.query; --block) {
    float* query_sums = own_sums;
    if (work.query_sums) query_sums = work.query_sums + (cell.slot * blocks + block) * work.size * kQueries;
    backward_block<T>(work, unit / work.kv_heads, head, block * kQueries, cell.key * kPlanBlock, key_end, cell.first,
                      cell.last, key_sums, value_sums, query_sums, parts);
  }
}

template <typename T>
void finish_rows(const Attention& work, const HeadsOf& x, const float* sums, int64_t size, float scale, int64_t begin,
                 int64_t end) {
  const int64_t lanes = padded_lanes(size), all = work.batches * work.kv_heads * work.keys * lanes;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t unit = row / work.keys;
    T* y = head_of<T>(x, unit / work.kv_heads, unit % work.kv_heads, row % work.keys);
    const float* from = sums + row * lanes;
    for_vectors(size, [&](auto lanes_of, int64_t d) {
      Vec sum = lanes_of.load(from + d);
      for (int64_t split = 1; split < work.splits; ++split) sum = Vec::add(sum, lanes_of.load(from + split * all + d));
      lanes_of.store(y + d, Vec::mul(sum, Vec::broadcast(scale)));
    });
  }
}

}  // namespace
}  // namespace peft_ext
