// Functions that the formats of integers share, for codes of 2, 4 or 8 bits in 32-bit words; the first code is in the
// lowest bits. Words are also read as bytes; this is right because all CPUs that peft_ext supports are little-endian.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {
namespace {

// Returns the number of words that hold `count` codes. No code lies in two words.
inline int64_t words_of(int64_t count, int bits) { return (count >> 5) * bits + (((count & 31) * bits + 31) >> 5); }

// Returns the field of code i, where `word` is the word that holds code i.
inline int field_of(uint32_t word, int bits, int64_t i) {
  return static_cast<int>(word >> (i * bits & 31) & ((1u << bits) - 1));
}

// Returns code i of a row of words.
inline int code_at(const void* words, int bits, int64_t i) {
  return field_of(static_cast<const uint32_t*>(words)[i * bits >> 5], bits, i);
}

// Returns value / group. The division of 32-bit integers is faster than the division of 64-bit integers.
inline int64_t divided(int64_t value, int64_t group) {
  return value >> 32 ? value / group : static_cast<uint32_t>(value) / static_cast<uint32_t>(group);
}

// Returns the number of bytes of `count` scales.
inline int64_t scale_bytes(const PackedView& w, int64_t count) {
  return count * (scale_type(w.option) == ScaleType::kF32 ? 4 : 2);
}

inline bool has_float_scales(const PackedView& w) { return scale_type(w.option) <= ScaleType::kF16; }

// Returns the number of groups of a row's columns.
inline int64_t groups_of(const PackedView& w) { return w.group ? divided(w.columns + w.group - 1, w.group) : 1; }

// Returns the group of a column. `g_idx` has the group of each column, and is null if groups are consecutive columns.
// The operators do not check the values of g_idx: a group that does not exist is read as the last one.
inline int64_t group_at(const PackedView& w, const void* g_idx, int64_t column) {
  if (!g_idx) return w.group ? divided(column, w.group) : 0;
  const int64_t group = static_cast<const uint32_t*>(g_idx)[column], last = groups_of(w) - 1;
  return group < last ? group : last;
}

#ifndef __CUDACC__

// Returns whether the 32 columns from any multiple of 32 on belong to one group. one_group_in_32 returns false for
// every weight with g_idx.
inline bool one_group_in_32(const PackedView& w, const void* g_idx) { return !g_idx && w.group % 32 == 0; }

// Returns the group of a column if groups are consecutive columns.
inline int64_t group_in_order(const PackedView& w, int64_t column) { return group_at(w, nullptr, column); }

// Writes to groups[c] the index of the group of column `column` + c, for 32 columns.
inline void groups_of_32(const PackedView& w, const void* g_idx, int64_t column, int32_t* groups) {
  if (!g_idx) {
    for (int c = 0; c < 32; ++c) groups[c] = static_cast<int32_t>(group_at(w, nullptr, column + c));
    return;
  }
  const uint32_t* of = static_cast<const uint32_t*>(g_idx) + column;
  const uint32_t last = static_cast<uint32_t>(groups_of(w) - 1);
  for (int c = 0; c < 32; ++c) groups[c] = static_cast<int32_t>(of[c] < last ? of[c] : last);
}

// Calls call(constant), where kType of the constant's type is the dtype of the scales, so that loops over scales do not
// test the dtype.
template <ScaleType kScale>
struct ScaleConstant {
  static constexpr ScaleType kType = kScale;
};
template <typename Call>
inline void with_scale_type(ScaleType type, const Call& call) {
  if (type == ScaleType::kF32) return call(ScaleConstant<ScaleType::kF32>{});
  if (type == ScaleType::kBF16) return call(ScaleConstant<ScaleType::kBF16>{});
  call(ScaleConstant<ScaleType::kF16>{});
}

// Writes (code - zero(c)) * scale(c) for the 32 codes of kBits bits in 4 * kBits bytes, the lowest bits first.
template <int kBits, typename Zero, typename Scale>
inline void scale_codes(const uint8_t* bytes, const Zero& zero, const Scale& scale, float* out) {
  constexpr int kCodes = 8 / kBits, kMask = (1 << kBits) - 1;
  for (int i = 0; i < 4 * kBits; ++i) {
    const int byte = bytes[i];
    for (int j = 0; j < kCodes; ++j) {
      const int c = i * kCodes + j;
      out[c] = static_cast<float>((byte >> (kBits * j) & kMask) - zero(c)) * scale(c);
    }
  }
}

template <typename Zero, typename Scale>
inline void scale_codes(const uint8_t* bytes, int bits, const Zero& zero, const Scale& scale, float* out) {
  if (bits == 4) return scale_codes<4>(bytes, zero, scale, out);
  if (bits == 8) return scale_codes<8>(bytes, zero, scale, out);
  scale_codes<2>(bytes, zero, scale, out);
}

// Writes (code - zero) * scale for 32 codes. The function is not inlined: if the bytes are a local array, GCC would
// unroll the loop instead of vectorizing the loop.
template <int kBits>
[[gnu::noinline]] void scale_local_codes(const uint8_t* bytes, int zero, float scale, float* out) {
  scale_codes<kBits>(bytes, [=](int) { return zero; }, [=](int) { return scale; }, out);
}

#endif

}  // namespace
}  // namespace peft_ext
