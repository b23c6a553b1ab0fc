// The quantized types of GGUF files (ggml, llama.cpp): W[n, k] = scale * code, or scale * code + offset.
//
// part 0: the bytes of the file, uint8 [N, K / kColumns * kBytes]. A row is a whole number of blocks; a block holds
// kColumns columns (32 or 256) in kBytes bytes. Each struct below is the layout of one type's block:
//
//   kColumns, kBytes, kOffset       size of a block, and whether the type has an offset
//   float scale(block, g)           scale of group g: the columns 16 g to 16 g + 15 of the block
//   float offset(block, g)          offset of group g, if kOffset
//   int code(block, g, i)           code of column 16 g + i
//
// The order of operations is that of the Python package gguf (gguf/quants.py). Each product of scale and code has at
// most 24 significant bits and is exact in float32; a fused multiply-add therefore gives the same bits. Blocks are not
// aligned, so that all fields are read as bytes. A code of IQ4_NL, IQ4_XS and MXFP4 is an index into a table.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {
namespace {

// Returns the two bytes of a float16 or uint16 at any address.
PEFT_EXT_BOTH uint16_t gguf_u16(const uint8_t* bytes) { return static_cast<uint16_t>(bytes[0] | bytes[1] << 8); }

PEFT_EXT_BOTH float gguf_half(const uint8_t* bytes) { return half_value(gguf_u16(bytes)); }

// Blocks of 32 columns: column i and column i + 16 share a byte, the low nibble is column i.
PEFT_EXT_BOTH int gguf_nibble(const uint8_t* codes, int g, int i) { return codes[i] >> 4 * g & 15; }

// Bit 16 g + i of the four bytes that hold the fifth bits of 32 codes.
PEFT_EXT_BOTH int gguf_fifth_bit(const uint8_t* bits, int g, int i) { return gguf_u16(bits + 2 * g) >> i & 1; }

struct BlockQ4_0 {
  static constexpr int kColumns = 32, kBytes = 18;  // d, codes [16]
  static constexpr bool kOffset = false;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int) { return gguf_half(b); }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 2, g, i) - 8; }
};

struct BlockQ4_1 {
  static constexpr int kColumns = 32, kBytes = 20;  // d, m, codes [16]
  static constexpr bool kOffset = true;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int) { return gguf_half(b); }
  PEFT_EXT_BOTH static float offset(const uint8_t* b, int) { return gguf_half(b + 2); }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 4, g, i); }
};

struct BlockQ5_0 {
  static constexpr int kColumns = 32, kBytes = 22;  // d, fifth bits [4], codes [16]
  static constexpr bool kOffset = false;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int) { return gguf_half(b); }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) {
    return (gguf_nibble(b + 6, g, i) | gguf_fifth_bit(b + 2, g, i) << 4) - 16;
  }
};

struct BlockQ5_1 {
  static constexpr int kColumns = 32, kBytes = 24;  // d, m, fifth bits [4], codes [16]
  static constexpr bool kOffset = true;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int) { return gguf_half(b); }
  PEFT_EXT_BOTH static float offset(const uint8_t* b, int) { return gguf_half(b + 2); }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) {
    return gguf_nibble(b + 8, g, i) | gguf_fifth_bit(b + 4, g, i) << 4;
  }
};

struct BlockQ8_0 {
  static constexpr int kColumns = 32, kBytes = 34;  // d, int8 codes [32]
  static constexpr bool kOffset = false;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int) { return gguf_half(b); }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) { return static_cast<int8_t>(b[2 + 16 * g + i]); }
};

// Two bits of column 16 g + i. 128 columns share 32 bytes; 32 columns take the same two bits of these bytes.
PEFT_EXT_BOTH int gguf_two_bits(const uint8_t* codes, int g, int i) {
  return codes[g / 8 * 32 + g % 2 * 16 + i] >> g / 2 % 4 * 2 & 3;
}

// Bit of column 16 g + i in 32 bytes, which hold one bit for each of 256 columns.
PEFT_EXT_BOTH int gguf_one_bit(const uint8_t* bits, int g, int i) { return bits[g % 2 * 16 + i] >> g / 2 & 1; }

// Four bits of column 16 g + i. 64 columns share 32 bytes; 32 columns take the same nibble of these bytes.
PEFT_EXT_BOTH int gguf_k_nibble(const uint8_t* codes, int g, int i) {
  return codes[g / 4 * 32 + g % 2 * 16 + i] >> g / 2 % 2 * 4 & 15;
}

struct BlockQ2_K {
  static constexpr int kColumns = 256, kBytes = 84;  // scale and minimum, a nibble each [16], codes [64], d, dmin
  static constexpr bool kOffset = true;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int g) {
    return gguf_half(b + 80) * static_cast<float>(b[g] & 15);
  }
  PEFT_EXT_BOTH static float offset(const uint8_t* b, int g) {
    return -(gguf_half(b + 82) * static_cast<float>(b[g] >> 4));
  }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) { return gguf_two_bits(b + 16, g, i); }
};

struct BlockQ3_K {
  static constexpr int kColumns = 256, kBytes = 110;  // third bits [32], codes [64], scales of 6 bits [12], d
  static constexpr bool kOffset = false;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int g) {
    const uint8_t* scales = b + 96;
    const int low = scales[g % 8] >> g / 8 * 4 & 15, high = scales[8 + g % 4] >> g / 4 * 2 & 3;
    return gguf_half(b + 108) * static_cast<float>((low | high << 4) - 32);
  }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) {
    return (gguf_two_bits(b + 32, g, i) | gguf_one_bit(b, g, i) << 2) - 4;
  }
};

// The 6-bit scale and the 6-bit minimum of 32 columns, s in [0, 8), in the 12 bytes of Q4_K and Q5_K.
PEFT_EXT_BOTH int gguf_k_scale(const uint8_t* bytes, int s) {
  return s < 4 ? bytes[s] & 63 : (bytes[s + 4] & 15) | (bytes[s - 4] >> 2 & 48);
}
PEFT_EXT_BOTH int gguf_k_minimum(const uint8_t* bytes, int s) {
  return s < 4 ? bytes[s + 4] & 63 : bytes[s + 4] >> 4 | (bytes[s] >> 2 & 48);
}

struct BlockQ4_K {
  static constexpr int kColumns = 256, kBytes = 144;  // d, dmin, scales and minima [12], codes [128]
  static constexpr bool kOffset = true;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int g) {
    return gguf_half(b) * static_cast<float>(gguf_k_scale(b + 4, g / 2));
  }
  PEFT_EXT_BOTH static float offset(const uint8_t* b, int g) {
    return -(gguf_half(b + 2) * static_cast<float>(gguf_k_minimum(b + 4, g / 2)));
  }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) { return gguf_k_nibble(b + 16, g, i); }
};

struct BlockQ5_K {
  static constexpr int kColumns = 256, kBytes = 176;  // d, dmin, scales and minima [12], fifth bits [32], codes [128]
  static constexpr bool kOffset = true;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int g) { return BlockQ4_K::scale(b, g); }
  PEFT_EXT_BOTH static float offset(const uint8_t* b, int g) { return BlockQ4_K::offset(b, g); }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) {
    return gguf_k_nibble(b + 48, g, i) | gguf_one_bit(b + 16, g, i) << 4;
  }
};

struct BlockQ6_K {
  static constexpr int kColumns = 256, kBytes = 210;  // low nibbles [128], high two bits [64], int8 scales [16], d
  static constexpr bool kOffset = false;
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int g) {
    return gguf_half(b + 208) * static_cast<float>(static_cast<int8_t>(b[192 + g]));
  }
  // 128 columns share 64 bytes of low nibbles; 64 columns take the same nibble of these bytes.
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) {
    const int low = b[g / 8 * 64 + g % 4 * 16 + i] >> g / 4 % 2 * 4 & 15;
    return (low | gguf_two_bits(b + 128, g, i) << 4) - 32;
  }
};

struct BlockIQ4_NL {
  static constexpr int kColumns = 32, kBytes = 18;  // d, codes [16]
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int) { return gguf_half(b); }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 2, g, i); }
};

struct BlockIQ4_XS {
  static constexpr int kColumns = 256,
                       kBytes = 136;  // d, high two bits and low nibbles of 8 scales [2 + 4], codes [128]
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int g) {
    const int s = g / 2, low = b[4 + s / 2] >> s % 2 * 4 & 15, high = gguf_u16(b + 2) >> 2 * s & 3;
    return gguf_half(b) * static_cast<float>((low | high << 4) - 32);
  }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 8 + g / 2 * 16, g % 2, i); }
};

struct BlockMXFP4 {
  static constexpr int kColumns = 32, kBytes = 17;  // e, codes [16]
  // 2^(e - 128), also for e = 255.
  PEFT_EXT_BOTH static float scale(const uint8_t* b, int) {
    const uint32_t e = b[0], bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
  PEFT_EXT_BOTH static int code(const uint8_t* b, int g, int i) { return gguf_nibble(b + 1, g, i); }
};

// The 16 values of the codes of IQ4_NL and IQ4_XS.
struct TableIQ4 {
  PEFT_EXT_BOTH static int value(int code) {
    constexpr int8_t kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return kValues[code];
  }
};

// Twice the 16 values of e2m1. The code 8 is +0 in ggml.
struct TableTwiceE2M1 {
  PEFT_EXT_BOTH static int value(int code) {
    constexpr int8_t kValues[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    return kValues[code];
  }
};

// Returns the block that holds W[row, column].
template <class Block>
PEFT_EXT_BOTH const uint8_t* gguf_block(const PackedView& w, int64_t row, int64_t column) {
  return static_cast<const uint8_t*>(w.part[0]) + (row * w.columns + column) / Block::kColumns * Block::kBytes;
}

template <class Block>
struct Gguf {
  PEFT_EXT_BOTH static float value(const PackedView& w, int64_t row, int64_t column) {
    const uint8_t* b = gguf_block<Block>(w, row, column);
    const int place = static_cast<int>(column % Block::kColumns), g = place / 16, i = place % 16;
    const float product = Block::scale(b, g) * static_cast<float>(Block::code(b, g, i));
    if constexpr (Block::kOffset) {
      return product + Block::offset(b, g);
    } else {
      return product;
    }
  }

#ifndef __CUDACC__
  static bool runs(const PackedView&) { return true; }  // rows are whole blocks of 32 or 256 columns

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* __restrict__ out) {
    const uint8_t* b = gguf_block<Block>(w, row, column);
    const int first = static_cast<int>(column % Block::kColumns) / 16;
    for (int half = 0; half < 2; ++half, out += 16) {
      const int g = first + half;
      const float scale = Block::scale(b, g);
      if constexpr (Block::kOffset) {
        const float offset = Block::offset(b, g);
        for (int i = 0; i < 16; ++i) out[i] = scale * static_cast<float>(Block::code(b, g, i)) + offset;
      } else {
        for (int i = 0; i < 16; ++i) out[i] = scale * static_cast<float>(Block::code(b, g, i));
      }
    }
  }
#endif
};

template <class Block, class Table>
struct GgufTable {
  PEFT_EXT_BOTH static float value(const PackedView& w, int64_t row, int64_t column) {
    const uint8_t* b = gguf_block<Block>(w, row, column);
    const int place = static_cast<int>(column % Block::kColumns), g = place / 16, i = place % 16;
    return Block::scale(b, g) * static_cast<float>(Table::value(Block::code(b, g, i)));
  }

#ifndef __CUDACC__
  static bool runs(const PackedView&) { return true; }  // rows are whole blocks of 32 or 256 columns

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* __restrict__ out) {
    const uint8_t* b = gguf_block<Block>(w, row, column);
    const int first = static_cast<int>(column % Block::kColumns) / 16;
    for (int half = 0; half < 2; ++half, out += 16) {
      const int g = first + half;
      const float scale = Block::scale(b, g);
      int8_t values[16];
#if defined(__GNUC__) && !defined(__clang__)
      // One byte shuffle instead of 16 loads from the table. Clang has no shuffle with a mask that is not constant.
      typedef int8_t Bytes __attribute__((vector_size(16)));
      Bytes table, codes;
      for (int i = 0; i < 16; ++i) table[i] = static_cast<int8_t>(Table::value(i));
      for (int i = 0; i < 16; ++i) codes[i] = static_cast<int8_t>(Block::code(b, g, i));
      const Bytes found = __builtin_shuffle(table, codes);
      memcpy(values, &found, sizeof(values));
#else
      for (int i = 0; i < 16; ++i) values[i] = static_cast<int8_t>(Table::value(Block::code(b, g, i)));
#endif
      for (int i = 0; i < 16; ++i) out[i] = scale * static_cast<float>(values[i]);
    }
  }
#endif
};

using GgufQ4_0 = Gguf<BlockQ4_0>;
using GgufQ4_1 = Gguf<BlockQ4_1>;
using GgufQ5_0 = Gguf<BlockQ5_0>;
using GgufQ5_1 = Gguf<BlockQ5_1>;
using GgufQ8_0 = Gguf<BlockQ8_0>;
using GgufQ2_K = Gguf<BlockQ2_K>;
using GgufQ3_K = Gguf<BlockQ3_K>;
using GgufQ4_K = Gguf<BlockQ4_K>;
using GgufQ5_K = Gguf<BlockQ5_K>;
using GgufQ6_K = Gguf<BlockQ6_K>;
using GgufIQ4_NL = GgufTable<BlockIQ4_NL, TableIQ4>;
using GgufIQ4_XS = GgufTable<BlockIQ4_XS, TableIQ4>;
using GgufMXFP4 = GgufTable<BlockMXFP4, TableTwiceE2M1>;

}  // namespace
}  // namespace peft_ext
