// The quantized types of GGUF files (ggml, llama.cpp): W[n, k] = scale * number(code), or scale * number(code) +
// offset. number(code) is Number::value of the template argument Number of Gguf.
//
// part 0: the bytes of the file, uint8 [N, K / kColumns * kBytes], in the blocks of gguf_blocks.h. K is a multiple of
// the number of columns in a block, and `group` is the number of columns in a block.
#pragma once

#include "weight/formats/gguf_blocks.h"
#ifndef __CUDACC__
#include "weight/formats/gguf_runs.h"
#endif

namespace peft_ext {
namespace {

// The number that a stored code stands for: code - kBias.
template <int kBias>
struct GgufMinus {
  static constexpr bool kTable = false;
  static constexpr int value(int code) { return code - kBias; }
};

struct GgufIQ4Table {
  static constexpr bool kTable = true;
  static constexpr int value(int code) {
    constexpr int8_t kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return kValues[code];
  }
};

// The number that a stored code stands for: twice the e2m1 value of the code. The code 8 is +0 in ggml.
struct GgufTwiceE2M1 {
  static constexpr bool kTable = true;
  static constexpr int value(int code) {
    constexpr int8_t kValues[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    return kValues[code];
  }
};

template <class Block, class Number>
struct Gguf {
  static const char* refused(const PackedView& w) {
    if (w.group == Block::kColumns && w.columns % Block::kColumns == 0) return nullptr;
    return Block::kColumns == 32 ? "group 32, and a multiple of 32 columns"
                                 : "group 256, and a multiple of 256 columns";
  }
  static int64_t part_bytes(const PackedView& w, int part) {
    return part == 0 ? w.rows * (w.columns / Block::kColumns * Block::kBytes) : 0;
  }

  static float value(const PackedView& w, int64_t row, int64_t column) {
    const uint8_t* b = block(w, row, column);
    const int place = static_cast<int>(column % Block::kColumns), g = place / 16;
    const float product = Block::scale(b, g) * static_cast<float>(Number::value(Block::code(b, g, place % 16)));
    if constexpr (Block::kOffset) {
      return product + Block::offset(b, g);
    } else {
      return product;
    }
  }

#ifndef __CUDACC__
  static bool runs(const PackedView&) { return true; }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* __restrict__ out) {
    const uint8_t* b = block(w, row, column);
    const int s = static_cast<int>(column % Block::kColumns) / 32;
    GgufWords codes;
    gguf_codes(Block(), b, s, &codes);
    if constexpr (Number::kTable) gguf_look_up<Number>(&codes);
    int8_t bytes[32];
    memcpy(bytes, &codes, sizeof(bytes));
    // One loop handles all 32 bytes, even if there are two scales, because loops over 16 bytes would use shorter
    // vectors. Two offsets are in an array, because GCC does not vectorize a loop that selects both a scale and an
    // offset.
    const float scale = Block::scale(b, 2 * s), scale2 = Block::kScaled == 16 ? Block::scale(b, 2 * s + 1) : scale;
    float offset = 0.0f, offsets[32];
    if constexpr (Block::kOffset) {
      offset = Block::offset(b, 2 * s);
      const float offset2 = Block::kScaled == 16 ? Block::offset(b, 2 * s + 1) : offset;
      for (int i = 0; i < 32; ++i) offsets[i] = i & 16 ? offset2 : offset;
    }
    for (int i = 0; i < 32; ++i) {
      const float number = static_cast<float>(Number::kTable ? bytes[i] : Number::value(bytes[i]));
      const float product = (i & 16 ? scale2 : scale) * number;
      out[i] = !Block::kOffset ? product : product + (Block::kScaled == 16 ? offsets[i] : offset);
    }
  }
#endif

  // Returns the block that holds W[row, column].
  static const uint8_t* block(const PackedView& w, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(w.part[0]) + (row * w.columns + column) / Block::kColumns * Block::kBytes;
  }
};

// The format of a GGUF type that stores the codes of 32 columns in 16 bytes. GgufNibbles adds the members for 4-bit
// codes that weight/formats/list.h describes.
template <class Block, class Number>
struct GgufNibbles : Gguf<Block, Number> {
#ifndef __CUDACC__
  static constexpr Nibbles kNibbles = Nibbles::kHalves;
  static constexpr bool kContiguous = false;
  static constexpr int kScaleColumns = 32;
  static bool has_nibbles(const PackedView&) { return true; }
  static const float* table16() {
    static constexpr float kTable[16] = {Number::value(0),  Number::value(1),  Number::value(2),  Number::value(3),
                                         Number::value(4),  Number::value(5),  Number::value(6),  Number::value(7),
                                         Number::value(8),  Number::value(9),  Number::value(10), Number::value(11),
                                         Number::value(12), Number::value(13), Number::value(14), Number::value(15)};
    return kTable;
  }
  static const uint8_t* codes32(const PackedView& w, int64_t row, int64_t column) {
    return GgufNibbles::block(w, row, column) + Block::kCodes + column % Block::kColumns / 2;
  }
  static void entries(const PackedView& w, int64_t row, int64_t column, float* out) {
    const uint8_t* b = GgufNibbles::block(w, row, column);
    const int g = static_cast<int>(column % Block::kColumns) / 16;
    const float scale = Block::scale(b, g), *table = table16();
    float offset = 0.0f;
    if constexpr (Block::kOffset) offset = Block::offset(b, g);
    for (int i = 0; i < 16; ++i) out[i] = Block::kOffset ? scale * table[i] + offset : scale * table[i];
  }
  static void scales(const PackedView& w, int64_t row, int64_t column, int64_t count, float* scale) {
    for (int64_t i = 0; i < count; ++i, column += 32)
      scale[i] = Block::scale(GgufNibbles::block(w, row, column), static_cast<int>(column % Block::kColumns) / 16);
  }
#endif
};

using GgufQ4_0 = GgufNibbles<BlockQ4_0, GgufMinus<8>>;
using GgufQ4_1 = GgufNibbles<BlockQ4_1, GgufMinus<0>>;
using GgufQ5_0 = Gguf<BlockQ5_0, GgufMinus<16>>;
using GgufQ5_1 = Gguf<BlockQ5_1, GgufMinus<0>>;
using GgufQ8_0 = Gguf<BlockQ8_0, GgufMinus<0>>;
using GgufQ2_K = Gguf<BlockQ2_K, GgufMinus<0>>;
using GgufTQ2_0 = Gguf<BlockTQ2_0, GgufMinus<1>>;
using GgufQ3_K = Gguf<BlockQ3_K, GgufMinus<4>>;
using GgufQ4_K = Gguf<BlockQ4_K, GgufMinus<0>>;
using GgufQ5_K = Gguf<BlockQ5_K, GgufMinus<0>>;
using GgufQ6_K = Gguf<BlockQ6_K, GgufMinus<32>>;
using GgufIQ4_NL = GgufNibbles<BlockIQ4_NL, GgufIQ4Table>;
using GgufIQ4_XS = GgufNibbles<BlockIQ4_XS, GgufIQ4Table>;
using GgufMXFP4 = GgufNibbles<BlockMXFP4, GgufTwiceE2M1>;

}  // namespace
}  // namespace peft_ext
