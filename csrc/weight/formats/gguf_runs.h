// Reads the codes of a run of 32 columns of GGUF's blocks at once: gguf_codes(Block, b, s, out) writes the codes
// Block::code(b, 2 s, 0 to 15) and Block::code(b, 2 s + 1, 0 to 15), a byte each. Bytes are shifted in words of eight;
// a mask removes the bits that move from one byte to the next. gguf_runs.h is compiled only for the CPU. See
// gguf_blocks.h for the blocks.
#pragma once

#include "weight/formats/gguf_blocks.h"

namespace peft_ext {
namespace {

typedef uint64_t GgufWords __attribute__((vector_size(32)));  // 32 codes

constexpr uint64_t kGgufOnes = 0x0101010101010101u;

// Writes the 32 codes of 16 bytes: the low nibbles are the first 16 codes, and the high nibbles are the last 16 codes.
inline void gguf_nibbles(const uint8_t* bytes, GgufWords* out) {
  uint64_t words[2];
  memcpy(words, bytes, sizeof(words));
  const GgufWords twice = {words[0], words[1], words[0], words[1]}, shifts = {0, 0, 4, 4};
  *out = twice >> shifts & 15 * kGgufOnes;
}

// Adds 16 to each of 32 codes whose bit in the four bytes `bits` is set.
inline void gguf_add_fifth_bits(const uint8_t* bits, GgufWords* codes) {
  // Byte i of a word is 1 << i if the fifth bit of code i is set, otherwise 0. Adding 127 carries a set bit into the
  // highest bit of the byte.
  constexpr uint64_t kDiagonal = 0x8040201008040201u;
  const GgufWords spread = {bits[0] * kGgufOnes, bits[1] * kGgufOnes, bits[2] * kGgufOnes, bits[3] * kGgufOnes};
  *codes |= (((spread & kDiagonal) + 127 * kGgufOnes) & 128 * kGgufOnes) >> 3;
}

// Writes the 32 codes of run s from fields of kBits bits, in the order of gguf_field.
template <int kBits>
inline void gguf_fields(const uint8_t* bytes, int s, GgufWords* out) {
  constexpr int kRuns = 8 / kBits;
  GgufWords words;
  memcpy(&words, bytes + s / kRuns * 32, sizeof(words));
  *out = words >> s % kRuns * kBits & ((1 << kBits) - 1) * kGgufOnes;
}

inline void gguf_codes(BlockQ4_0, const uint8_t* b, int, GgufWords* out) { gguf_nibbles(b + 2, out); }
inline void gguf_codes(BlockQ4_1, const uint8_t* b, int, GgufWords* out) { gguf_nibbles(b + 4, out); }
inline void gguf_codes(BlockQ5_0, const uint8_t* b, int, GgufWords* out) {
  gguf_nibbles(b + 6, out);
  gguf_add_fifth_bits(b + 2, out);
}
inline void gguf_codes(BlockQ5_1, const uint8_t* b, int, GgufWords* out) {
  gguf_nibbles(b + 8, out);
  gguf_add_fifth_bits(b + 4, out);
}
inline void gguf_codes(BlockQ8_0, const uint8_t* b, int, GgufWords* out) { memcpy(out, b + 2, sizeof(*out)); }
inline void gguf_codes(BlockIQ4_NL, const uint8_t* b, int, GgufWords* out) { gguf_nibbles(b + 2, out); }
inline void gguf_codes(BlockMXFP4, const uint8_t* b, int, GgufWords* out) { gguf_nibbles(b + 1, out); }
inline void gguf_codes(BlockIQ4_XS, const uint8_t* b, int s, GgufWords* out) { gguf_nibbles(b + 8 + 16 * s, out); }
inline void gguf_codes(BlockTQ2_0, const uint8_t* b, int s, GgufWords* out) { gguf_fields<2>(b, s, out); }
inline void gguf_codes(BlockQ2_K, const uint8_t* b, int s, GgufWords* out) { gguf_fields<2>(b + 16, s, out); }
inline void gguf_codes(BlockQ4_K, const uint8_t* b, int s, GgufWords* out) { gguf_fields<4>(b + 16, s, out); }
inline void gguf_codes(BlockQ3_K, const uint8_t* b, int s, GgufWords* out) {
  GgufWords low, high;
  gguf_fields<2>(b + 32, s, &low);
  gguf_fields<1>(b, s, &high);
  *out = low | high << 2;
}
inline void gguf_codes(BlockQ5_K, const uint8_t* b, int s, GgufWords* out) {
  GgufWords low, high;
  gguf_fields<4>(b + 48, s, &low);
  gguf_fields<1>(b + 16, s, &high);
  *out = low | high << 4;
}
inline void gguf_codes(BlockQ6_K, const uint8_t* b, int s, GgufWords* out) {
  GgufWords low, high;
  gguf_fields<4>(b, BlockQ6_K::nibble_run(s), &low);
  gguf_fields<2>(b + 128, s, &high);
  *out = low | high << 4;
}

// Replaces 32 codes from 0 to 15 by Number::value of the codes.
template <class Number>
inline void gguf_look_up(GgufWords* codes) {
#if defined(__GNUC__) && !defined(__clang__)
  // A shuffle of bytes replaces 32 loads. Clang's vector types have no shuffle whose indices are a variable.
  typedef int8_t Bytes __attribute__((vector_size(32)));
  constexpr auto at = [](int code) { return static_cast<int8_t>(Number::value(code)); };
  const Bytes table = {at(0), at(1), at(2),  at(3),  at(4),  at(5),  at(6),  at(7),
                       at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15)};
  *codes = reinterpret_cast<GgufWords>(__builtin_shuffle(table, reinterpret_cast<Bytes>(*codes)));
#else
  int8_t bytes[32];
  memcpy(bytes, codes, sizeof(bytes));
  for (int i = 0; i < 32; ++i) bytes[i] = static_cast<int8_t>(Number::value(bytes[i]));
  memcpy(codes, bytes, sizeof(bytes));
#endif
}

}  // namespace
}  // namespace peft_ext
