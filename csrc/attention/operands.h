// Makes the left and right operands of attention's products (see attention/kernels.h) from rows of q, k, v and dO.
// Include this file after the headers that attention/kernels_impl.h lists.
#pragma once

#include <string.h>

#include "attention/kernels.h"
#include "cpu/parts.h"
#include "cpu/row_loop.h"

namespace peft_ext {
namespace {

constexpr int64_t kQueries = kMaskBits;  // number of queries in a block: one for each bit of a mask word

inline int64_t whole(int64_t count, int64_t of) { return ceil_div(count, of) * of; }
inline int64_t padded_depth(int64_t depth) { return whole(depth, kDepth); }
inline int64_t words_of_depth(int64_t depth) { return padded_depth(depth) / kWord; }
inline int64_t padded_lanes(int64_t columns) { return whole(columns, kWidth); }

template <typename T>
constexpr bool kTaken = sizeof(T) == sizeof(Element);

// Rows of a head [rows, depth] of q, k, v or dO, row-major.
struct Rows {
  const Element* data;
  int64_t stride;
  const Element* row(int64_t r) const { return data + r * stride; }
};

template <typename T>
inline void convert_row(const T* x, int64_t depth, Element* y) {
  if constexpr (kTaken<T>)
    memcpy(y, x, static_cast<size_t>(depth) * sizeof(T));
  else
    for_vectors(depth, [&](auto lanes, int64_t i) { lanes.store(y + i, lanes.load(x + i)); });
  for (int64_t i = depth; i < padded_depth(depth); ++i) y[i] = Element{};
}

// Returns whether products can read rows of T with this depth in place: T is the operands' element type, and the depth
// needs no padding.
template <typename T>
inline bool lies_right(int64_t depth) {
  return kTaken<T> && depth % kDepth == 0;
}

// Returns rows of x in the operands' element type, padded with zeros to the padded depth: x in place if
// lies_right(depth), otherwise a copy in `made` [count, padded depth].
template <typename T>
inline Rows rows_of_heads(const T* x, int64_t token, int64_t count, int64_t depth, Element* made) {
  if constexpr (kTaken<T>)
    if (lies_right<T>(depth)) return {x, token};
  for (int64_t i = 0; i < count; ++i) convert_row(x + i * token, depth, made + i * padded_depth(depth));
  return {made, padded_depth(depth)};
}

// Writes rows of a head as a right operand whose depth is the head size: each row becomes a lane. Lanes beyond the
// `count` rows are set to zero.
inline void turn_rows(const Rows& rows, int64_t count, int64_t depth, int64_t lanes, Element* right) {
  const int64_t words = words_of_depth(depth);
  transpose_words(rows.data, rows.stride * static_cast<int64_t>(sizeof(Element)), count, words, right, lanes);
  if (count < lanes)
    for (int64_t w = 0; w < words; ++w)
      memset(right + (w * lanes + count) * kWord, 0, static_cast<size_t>((lanes - count) * kWord) * sizeof(Element));
}

// Writes rows of a head as a right operand whose depth is the rows; rows of zeros pad the depth to a multiple of
// kDepth. The columns become the lanes, padded to whole vectors.
inline void join_all(const Rows& rows, int64_t count, int64_t columns, Element* right) {
  const int64_t lanes = padded_lanes(columns);
  for (int64_t i = 0; i < count; i += kWord) {
    const bool pair = kWord == 2 && i + 1 < count;
    join_rows(rows.row(i), pair ? rows.row(i + 1) : nullptr, columns, right + i * lanes);
  }
  const int64_t written = whole(count, kWord);
  memset(right + written * lanes, 0, static_cast<size_t>((padded_depth(count) - written) * lanes) * sizeof(Element));
}

template <typename T>
inline T* head_of(const HeadsOf& x, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + token * x.token;
}

// Stores the sums of a block of queries as rows of y. `sums` is [size, 64]: column i, multiplied by factor(i), becomes
// row i of y. Rows of y are `token` elements apart. `turned` is scratch memory for the transposed sums.
template <typename T, typename F>
inline void store_turned(const float* sums, int64_t size, int64_t count, float* turned, T* y, int64_t token,
                         const F& factor) {
  transpose_words(sums, kQueries * 4, size, whole(count, kWidth), turned, size);
  for (int64_t i = 0; i < count; ++i) {
    const Vec times = Vec::broadcast(factor(i));
    for_vectors(size, [&](auto lanes, int64_t d) {
      lanes.store(y + i * token + d, Vec::mul(lanes.load(turned + i * size + d), times));
    });
  }
}

// A left operand of a product in memory. If kLeftRows is 1, the operand is row-major. Otherwise kLeftRows rows are a
// strip, which is stored as tiles of kLeftRows rows by kDepth values one after another. Strips (or rows) are `stride`
// elements apart.
struct Left {
  const Element* data;
  int64_t stride;
  // Returns the operand from row `row` and depth `depth` on; a tile must begin at (row, depth).
  Left part(int64_t row, int64_t depth) const { return {data + row / kLeftRows * stride + depth * kLeftRows, stride}; }
};

// Returns the index of a value in a left operand.
inline int64_t left_index(int64_t row, int64_t depth, int64_t stride) {
  if constexpr (kLeftRows == 1) return row * stride + depth;
  const int64_t tile = row / kLeftRows * stride + depth / kDepth * kDepth * kLeftRows;
  return tile + row % kLeftRows * kDepth + depth % kDepth;
}

inline void multiply(int64_t rows, int64_t vecs, const Left& left, const Element* right, int64_t right_stride,
                     int64_t steps, float* c, int64_t c_stride, bool add) {
  multiply(rows, vecs, left.data, left.stride, right, right_stride, steps, c, c_stride, add);
}

// Writes rows of x to a left operand, from the start of a strip on. The missing rows of an incomplete last strip are
// not written: a product reads them, but only unused rows of the result depend on them.
template <typename T>
inline void write_left(const T* x, int64_t token, int64_t count, int64_t depth, Element* left) {
  const int64_t stride = kLeftRows * padded_depth(depth), step = kLeftRows == 1 ? depth : kDepth;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < depth; d += step)
      convert_row(x + i * token + d, min_i64(step, depth - d), left + left_index(i, d, stride));
}

// Returns the number of elements in a copy of k or v as a left operand [rows, depth].
inline int64_t left_size(int64_t rows, int64_t depth) { return whole(rows, kLeftRows) * padded_depth(depth); }

// Returns k or v of a key head as the left operand [keys, depth]: the copy `made`, or the rows of x in place if `made`
// is null.
inline Left whole_rows(const HeadsOf& x, const void* made, int64_t batch, int64_t head, int64_t unit, int64_t keys,
                       int64_t depth) {
  if (made == nullptr) return {head_of<const Element>(x, batch, head, 0), x.token};
  return {static_cast<const Element*>(made) + unit * left_size(keys, depth), kLeftRows * padded_depth(depth)};
}

// Returns the transpose of k or v of a key head as the left operand [depth, keys].
inline Left whole_columns(const void* made, int64_t unit, int64_t keys, int64_t depth) {
  return {static_cast<const Element*>(made) + unit * left_size(depth, keys), kLeftRows * padded_depth(keys)};
}

struct PackParts {
  Element *rows, *joined;
  PackParts(Parts* parts, int64_t depth)
      : rows(parts->take<Element>(kQueries * padded_depth(depth))),
        joined(parts->take<Element>(kQueries * padded_lanes(depth))) {}
};

// Copies the block of up to 64 keys of x (k or v) from key k0 on as left operands: to made_rows as stored, and to
// made_columns transposed. If made_rows or made_columns is null, the copy is not made.
template <typename T>
void pack_operand(const HeadsOf& x, int64_t batch, int64_t head, int64_t unit, int64_t keys, int64_t k0, int64_t depth,
                  void* made_rows, void* made_columns, Parts parts) {
  if (made_rows == nullptr && made_columns == nullptr) return;
  const PackParts own(&parts, depth);
  const int64_t count = min_i64(kQueries, keys - k0), lanes = padded_lanes(depth);
  const T* from = head_of<const T>(x, batch, head, k0);
  Element* into = nullptr;
  if (made_rows) {
    into = static_cast<Element*>(made_rows) + unit * left_size(keys, depth) + k0 * padded_depth(depth);
    write_left(from, x.token, count, depth, into);
  }
  if (made_columns == nullptr) return;
  const bool is_rows = kLeftRows == 1 && into != nullptr;
  const Rows rows = is_rows ? Rows{into, padded_depth(depth)} : rows_of_heads(from, x.token, count, depth, own.rows);
  join_all(rows, count, depth, own.joined);
  Element* columns = static_cast<Element*>(made_columns) + unit * left_size(depth, keys) + k0 * kLeftRows;
  const int64_t stride = kLeftRows * padded_depth(keys), words = words_of_depth(count);
  if constexpr (kLeftRows == 1) {
    transpose_words(own.joined, lanes * 4, words, depth, columns, stride / kWord);
  } else {
    constexpr int64_t kTileWords = kDepth / kWord;
    for (int64_t d = 0; d < depth; d += kLeftRows)
      for (int64_t w = 0; w < words; w += kTileWords)
        transpose_words(own.joined + (w * lanes + d) * kWord, lanes * 4, kTileWords, kLeftRows,
                        columns + left_index(d, w * kWord, stride), kTileWords);
  }
}

// Sets one split's sums of dK and dV to zero for the keys [key, key_end) of a key head. unit: index among the B · Hkv
// key heads.
inline void clear_sums(const Attention& work, int64_t unit, int64_t split, int64_t key, int64_t key_end) {
  const int64_t first = (split * work.batches * work.kv_heads + unit) * work.keys + key;
  const auto clear = [&](float* sums, int64_t lanes) {
    memset(sums + first * lanes, 0, static_cast<size_t>((key_end - key) * lanes) * sizeof(float));
  };
  clear(work.key_sums, padded_lanes(work.size));
  clear(work.value_sums, padded_lanes(work.value_size));
}

template <typename T>
void pack_units(const Attention& work, int64_t begin, int64_t end, void* scratch) {
  const int64_t blocks = ceil_div(work.keys, kQueries);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t unit = at / blocks, k0 = at % blocks * kQueries, count = min_i64(kQueries, work.keys - k0);
    const int64_t batch = unit / work.kv_heads, head = unit % work.kv_heads;
    const Parts parts{reinterpret_cast<uintptr_t>(scratch)};
    pack_operand<T>(work.k, batch, head, unit, work.keys, k0, work.size, work.key_rows, work.key_columns, parts);
    pack_operand<T>(work.v, batch, head, unit, work.keys, k0, work.value_size, work.value_rows, work.value_columns,
                    parts);
    if (work.key_sums == nullptr || k0 < work.reached) continue;
    for (int64_t split = 0; split < work.splits; ++split) clear_sums(work, unit, split, k0, k0 + count);
  }
}

}  // namespace
}  // namespace peft_ext
