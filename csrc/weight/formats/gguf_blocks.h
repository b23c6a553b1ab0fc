// The blocks of GGUF's quantized types. A block holds kColumns columns (32 or 256) in kBytes bytes, and is not aligned,
// so that all its fields are read as bytes. A group is 16 columns, and a run is 32 columns. Each struct has the
// following members:
//
//   kColumns and kBytes              are the sizes of a block in columns and in bytes.
//   kScaled                          is the number of columns that share a scale: 16 or 32.
//   kCodes and kFifthBits            are the offsets in a block of the codes' low nibbles and of the fifth bits; blocks
//                                    whose offsets no template reads do not have these members.
//   kOffset                          is true if W = scale * code + offset, and false if W = scale * code.
//   float scale(b, g), offset(b, g)  return the scale and the offset of group g of block b.
//   int code(b, g, i)                returns the stored code of column 16 g + i of block b.
//
// The comment of each struct lists the fields in the order of the file: d and dmin are float16 factors of the scales
// and of the minima, m is a float16 offset, and [n] is a number of bytes. The order of operations is that of the Python
// package gguf (gguf/quants.py). Each product of a scale and a code has at most 24 significant bits and is exact in
// float32; a fused multiply-add therefore gives the same bits.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {
namespace {

// Returns the two bytes of a float16 or uint16.
inline int gguf_u16(const uint8_t* bytes) { return bytes[0] | bytes[1] << 8; }

inline float gguf_half(const uint8_t* bytes) { return to_float(f16{static_cast<uint16_t>(gguf_u16(bytes))}); }

// --- Codes of blocks of 32 columns -----------------------------------------------------------------------------------

// Column i and column 16 + i share byte i: the low nibble is the code of column i.
inline int gguf_nibble(const uint8_t* bytes, int g, int i) { return bytes[i] >> 4 * g & 15; }

// The fifth bits of 32 codes are the bits of four bytes.
inline int gguf_fifth_bit(const uint8_t* bits, int g, int i) { return (gguf_u16(bits + 2 * g) >> i & 1) << 4; }

// --- Codes of blocks of 256 columns ----------------------------------------------------------------------------------

// 32 bytes hold the codes of 8 / kBits runs: each byte has a field of kBits bits for each run, and the lowest field
// belongs to the first run.
template <int kBits>
inline int gguf_field(const uint8_t* bytes, int g, int i) {
  constexpr int kRuns = 8 / kBits, kMask = (1 << kBits) - 1;
  const int run = g / 2;
  return bytes[run / kRuns * 32 + g % 2 * 16 + i] >> run % kRuns * kBits & kMask;
}

// --- Blocks of 32 columns --------------------------------------------------------------------------------------------

struct BlockQ4_0 {  // fields of Q4_0: d, codes [16]
  static constexpr int kColumns = 32, kBytes = 18, kCodes = 2, kScaled = 32;
  static constexpr bool kOffset = false;
  static float scale(const uint8_t* b, int) { return gguf_half(b); }
  static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 2, g, i); }
};

struct BlockQ4_1 {  // fields of Q4_1: d, m, codes [16]
  static constexpr int kColumns = 32, kBytes = 20, kCodes = 4, kScaled = 32;
  static constexpr bool kOffset = true;
  static float scale(const uint8_t* b, int) { return gguf_half(b); }
  static float offset(const uint8_t* b, int) { return gguf_half(b + 2); }
  static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 4, g, i); }
};

struct BlockQ5_0 {  // fields of Q5_0: d, fifth bits [4], codes [16]
  static constexpr int kColumns = 32, kBytes = 22, kCodes = 6, kFifthBits = 2, kScaled = 32;
  static constexpr bool kOffset = false;
  static float scale(const uint8_t* b, int) { return gguf_half(b); }
  static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 6, g, i) | gguf_fifth_bit(b + 2, g, i); }
};

struct BlockQ5_1 {  // fields of Q5_1: d, m, fifth bits [4], codes [16]
  static constexpr int kColumns = 32, kBytes = 24, kCodes = 8, kFifthBits = 4, kScaled = 32;
  static constexpr bool kOffset = true;
  static float scale(const uint8_t* b, int) { return gguf_half(b); }
  static float offset(const uint8_t* b, int) { return gguf_half(b + 2); }
  static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 8, g, i) | gguf_fifth_bit(b + 4, g, i); }
};

struct BlockQ8_0 {  // fields of Q8_0: d, codes: int8 [32]
  static constexpr int kColumns = 32, kBytes = 34, kScaled = 32;
  static constexpr bool kOffset = false;
  static float scale(const uint8_t* b, int) { return gguf_half(b); }
  static int code(const uint8_t* b, int g, int i) { return static_cast<int8_t>(b[2 + 16 * g + i]); }
};

struct BlockIQ4_NL {  // fields of IQ4_NL: d, codes [16]
  static constexpr int kColumns = 32, kBytes = 18, kCodes = 2, kScaled = 32;
  static constexpr bool kOffset = false;
  static float scale(const uint8_t* b, int) { return gguf_half(b); }
  static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 2, g, i); }
};

struct BlockMXFP4 {  // fields of MXFP4: exponent e, codes [16]
  static constexpr int kColumns = 32, kBytes = 17, kCodes = 1, kScaled = 32;
  static constexpr bool kOffset = false;
  // Returns 2^(e - 128), also for e = 255.
  static float scale(const uint8_t* b, int) {
    const uint32_t e = b[0], bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 1, g, i); }
};

// --- Blocks of 256 columns -------------------------------------------------------------------------------------------

struct BlockTQ2_0 {  // fields of TQ2_0: codes [64], d
  static constexpr int kColumns = 256, kBytes = 66, kScaled = 32;
  static constexpr bool kOffset = false;
  static float scale(const uint8_t* b, int) { return gguf_half(b + 64); }
  static int code(const uint8_t* b, int g, int i) { return gguf_field<2>(b, g, i); }
};

struct BlockQ2_K {  // fields of Q2_K: nibbles of scale and minimum [16], codes [64], d, dmin
  static constexpr int kColumns = 256, kBytes = 84, kScaled = 16;
  static constexpr bool kOffset = true;
  static float scale(const uint8_t* b, int g) { return gguf_half(b + 80) * static_cast<float>(b[g] & 15); }
  static float offset(const uint8_t* b, int g) { return -(gguf_half(b + 82) * static_cast<float>(b[g] >> 4)); }
  static int code(const uint8_t* b, int g, int i) { return gguf_field<2>(b + 16, g, i); }
};

struct BlockQ3_K {  // fields of Q3_K: third bits [32], codes [64], 6-bit scales [12], d
  static constexpr int kColumns = 256, kBytes = 110, kScaled = 16;
  static constexpr bool kOffset = false;
  static float scale(const uint8_t* b, int g) {
    const uint8_t* scales = b + 96;
    const int low = scales[g % 8] >> g / 8 * 4 & 15, high = scales[8 + g % 4] >> g / 4 * 2 & 3;
    return gguf_half(b + 108) * static_cast<float>((low | high << 4) - 32);
  }
  static int code(const uint8_t* b, int g, int i) { return gguf_field<2>(b + 32, g, i) | gguf_field<1>(b, g, i) << 2; }
};

// gguf_k_scale and gguf_k_minimum return the 6-bit scale and the 6-bit minimum of run s of a block of Q4_K or Q5_K.
// `bytes` are the 12 bytes of the block that hold the scales and minima.
inline int gguf_k_scale(const uint8_t* bytes, int s) {
  return s < 4 ? bytes[s] & 63 : (bytes[s + 4] & 15) | (bytes[s - 4] >> 2 & 48);
}
inline int gguf_k_minimum(const uint8_t* bytes, int s) {
  return s < 4 ? bytes[s + 4] & 63 : bytes[s + 4] >> 4 | (bytes[s] >> 2 & 48);
}

struct BlockQ4_K {  // fields of Q4_K: d, dmin, 6-bit scales and minima [12], codes [128]
  static constexpr int kColumns = 256, kBytes = 144, kCodes = 16, kScaled = 32;
  static constexpr bool kOffset = true;
  static float scale(const uint8_t* b, int g) { return gguf_half(b) * static_cast<float>(gguf_k_scale(b + 4, g / 2)); }
  static float offset(const uint8_t* b, int g) {
    return -(gguf_half(b + 2) * static_cast<float>(gguf_k_minimum(b + 4, g / 2)));
  }
  static int code(const uint8_t* b, int g, int i) { return gguf_field<4>(b + 16, g, i); }
};

struct BlockQ5_K {  // fields of Q5_K: d, dmin, 6-bit scales and minima [12], fifth bits [32], codes [128]
  static constexpr int kColumns = 256, kBytes = 176, kCodes = 48, kFifthBits = 16, kScaled = 32;
  static constexpr bool kOffset = true;
  static float scale(const uint8_t* b, int g) { return BlockQ4_K::scale(b, g); }
  static float offset(const uint8_t* b, int g) { return BlockQ4_K::offset(b, g); }
  static int code(const uint8_t* b, int g, int i) {
    return gguf_field<4>(b + 48, g, i) | gguf_field<1>(b + 16, g, i) << 4;
  }
};

struct BlockQ6_K {  // fields of Q6_K: low nibbles [128], high two bits [64], int8 scales [16], d
  static constexpr int kColumns = 256, kBytes = 210, kScaled = 16;
  static constexpr bool kOffset = false;
  static float scale(const uint8_t* b, int g) {
    return gguf_half(b + 208) * static_cast<float>(static_cast<int8_t>(b[192 + g]));
  }
  // 64 bytes hold the codes of four runs: runs 0 and 1 in the low nibbles, and runs 2 and 3 in the high nibbles.
  // gguf_field expects run 0 in the low and run 1 in the high nibbles of 32 bytes; nibble_run converts the number of a
  // run.
  static int nibble_run(int s) { return s / 4 * 4 + s % 2 * 2 + s / 2 % 2; }
  static int code(const uint8_t* b, int g, int i) {
    return gguf_field<4>(b, 2 * nibble_run(g / 2) + g % 2, i) | gguf_field<2>(b + 128, g, i) << 4;
  }
};

struct BlockIQ4_XS {  // fields of IQ4_XS: d, high two bits [2] and low nibbles [4] of eight scales, codes [128]
  static constexpr int kColumns = 256, kBytes = 136, kCodes = 8, kScaled = 32;
  static constexpr bool kOffset = false;
  static float scale(const uint8_t* b, int g) {
    const int s = g / 2, low = b[4 + s / 2] >> s % 2 * 4 & 15, high = gguf_u16(b + 2) >> 2 * s & 3;
    return gguf_half(b) * static_cast<float>((low | high << 4) - 32);
  }
  static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 8 + g / 2 * 16, g % 2, i); }
};

}  // namespace
}  // namespace peft_ext
