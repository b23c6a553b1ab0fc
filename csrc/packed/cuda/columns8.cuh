// Decoders of 8 columns at a time for the CUDA kernels. If OnCuda<Format> has the function `static void value8(const
// PackedView& w, int64_t row, int64_t column, float (&out)[8])`, a kernel calls value8 for 8 columns; otherwise a
// kernel calls `value` for each column. value8 writes the values of 8 columns from a multiple of 8 on, all of which
// exist, with the same bits as `value`. OnCuda<Format> may also have a `value` of its own, which returns the same bits
// as Format's `value`. The first weight's parts are aligned to 16 bytes; the parts of further weights of a stack follow
// without gaps. A specialization of OnCuda adds value8 to a format.
#pragma once

#include "cuda/ptx.cuh"
#include "weight/formats/list.h"

namespace peft_ext {
namespace {

template <typename Format>
struct OnCuda : Format {};

template <typename Format, typename = void>
constexpr bool kHasValue8 = false;
template <typename Format>
constexpr bool kHasValue8<Format, decltype(static_cast<void>(&Format::value8))> = true;

// Writes value_of(k) for the 8 columns k. The loop over k is not unrolled, because value_of may be long code. Each
// round moves all values down by one place and writes the last place, because a loop that is not unrolled cannot index
// registers.
template <typename ValueOf>
__device__ __forceinline__ void one_by_one(float (&out)[8], const ValueOf& value_of) {
#pragma unroll 1
  for (int k = 0; k < 8; ++k) {
    const float value = value_of(k);
#pragma unroll
    for (int i = 0; i < 7; ++i) out[i] = out[i + 1];
    out[7] = value;
  }
}

// Returns 8 bytes from an address that is aligned to 8 bytes if `whole` is true.
__device__ __forceinline__ uint2 eight_bytes(const void* from, bool whole) {
  if (whole) return load_cached(static_cast<const uint2*>(from));
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  uint2 words = make_uint2(0, 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words.x |= static_cast<uint32_t>(bytes[i]) << (8 * i);
    words.y |= static_cast<uint32_t>(bytes[4 + i]) << (8 * i);
  }
  return words;
}

// Returns byte i of 8 bytes.
__device__ __forceinline__ uint32_t byte_of(const uint2& words, int i) {
  return (i < 4 ? words.x : words.y) >> (8 * (i % 4)) & 255;
}

// Returns element `flat` and the next 7 elements of an array of 4-bit codes, the first in the lowest nibble. `first` is
// 0 if the low nibble of a byte is the even element, else 1. kWhole: flat is a multiple of 8, and the array is aligned
// to 4 bytes.
template <bool kWhole>
__device__ __forceinline__ uint32_t eight_nibbles(const void* codes, int64_t flat, int first) {
  const uint8_t* from = static_cast<const uint8_t*>(codes) + (flat >> 1);
  const auto in_order = [first](uint32_t word) {
    return first == 0 ? word : (word & 0x0f0f0f0fu) << 4 | (word >> 4 & 0x0f0f0f0fu);
  };
  if (kWhole) return in_order(load_cached(reinterpret_cast<const uint32_t*>(from)));
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(from[i]) << (8 * i);
  word = in_order(word);
  return flat % 2 == 0 ? word : word >> 4 | in_order(from[4]) << 28;
}

template <>
struct OnCuda<Mxfp4> : Mxfp4 {
  __device__ __forceinline__ static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]) {
    const int64_t flat = row * w.columns + column;
    const uint32_t codes = eight_nibbles<true>(w.part[0], flat, 0);
    const float scale = half_scale(w, flat >> 5);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = fmul_rn(e2m1_doubled(codes >> (4 * i) & 15), scale);
  }
};

template <>
struct OnCuda<Nvfp4> : Nvfp4 {
  __device__ __forceinline__ static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]) {
    const int64_t flat = row * w.columns + column;
    const uint32_t codes = eight_nibbles<true>(w.part[0], flat, 0);
    const float factor = scale(w, flat >> 4), zero = reciprocal(w) ? -0.0f : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = fmul_rn(code_value(codes >> (4 * i) & 15, zero), factor);
  }
};

template <>
struct OnCuda<Fp4> : Fp4 {
  __device__ __forceinline__ static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]) {
    const int64_t flat = row * w.columns + column;
    const uint32_t codes = flat % 8 == 0 && w.columns % 8 == 0 ? eight_nibbles<true>(w.part[0], flat, 1)
                                                               : eight_nibbles<false>(w.part[0], flat, 1);
    // A block has at least 32 elements, so that the 8 elements are in at most two blocks.
    const int shift = format_flags(w.option);
    const int64_t low = flat >> shift, high = (flat + 7) >> shift;
    const float first = scale(w, low);
    float second = first;
    if (high != low) second = scale(w, high);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out[i] = fmul_rn(code_value(codes >> (4 * i) & 15), (flat + i) >> shift == low ? first : second);
  }
};

template <>
struct OnCuda<Fp8> : Fp8 {
  __device__ __forceinline__ static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]) {
    const uint8_t* from = static_cast<const uint8_t*>(w.part[0]) + row * w.columns + column;
    const uint2 codes = eight_bytes(from, w.columns % 8 == 0);
    const float factor = scale(w, row, column);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = e4m3_value(byte_of(codes, i));
    if (column_shift(w) >= 3) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = fmul_rn(out[i], factor);
    } else {  // each scale serves 1, 2 or 4 of the 8 columns
      one_by_one(out, [&](int k) { return fmul_rn(out[0], scale(w, row, column + k)); });
    }
  }
};

// Returns scale i of an array whose dtype, float32, bfloat16 or float16, `option` names: like scale_value
// (packed_view.h), but with fewer branches.
__device__ __forceinline__ float float_scale(const PackedView& w, const void* scales, int64_t i) {
  if (scale_type(w.option) == ScaleType::kF32) return static_cast<const float*>(scales)[i];
  const uint32_t bits = static_cast<const uint16_t*>(scales)[i];
  return scale_type(w.option) == ScaleType::kBF16 ? unpack2<bf16>(bits).x : unpack2<f16>(bits).x;
}

// Returns whether any 8 columns from a multiple of 8 on lie in one group: groups are consecutive columns, and `group`
// is 0 or a multiple of 8.
__device__ __forceinline__ bool one_group_in_8(const PackedView& w, const void* g_idx) {
  return g_idx == nullptr && w.group % 8 == 0;
}

// Returns code i of 8 adjacent codes of 2, 4 or 8 bits.
__device__ __forceinline__ int code_of_8(const uint2& words, int bits, int i) {
  if (bits == 8) return static_cast<int>(byte_of(words, i));
  return static_cast<int>(words.x >> (bits * i) & ((1u << bits) - 1));
}

// Returns the codes of 8 columns from the words of the columns; word_at(i) is the i-th word of a row.
template <typename WordAt>
__device__ __forceinline__ uint2 eight_codes(int bits, int64_t column, const WordAt& word_at) {
  if (bits == 8) return make_uint2(word_at(column / 4), word_at(column / 4 + 1));
  return bits == 4 ? make_uint2(word_at(column / 8), 0) : make_uint2(word_at(column / 16) >> (column % 16 * 2), 0);
}

// Returns the group of a column: like group_at, but with a division in 32 bits, because a division in 64 bits is a call
// of a function. The host checks that a row has fewer than 2^32 columns.
__device__ __forceinline__ uint32_t group_in_32_bits(const PackedView& w, int64_t column) {
  return w.group == 0 ? 0 : static_cast<uint32_t>(column) / static_cast<uint32_t>(w.group);
}
__device__ __forceinline__ uint32_t group_in_32_bits(const PackedView& w, const void* g_idx, int64_t column) {
  if (g_idx == nullptr) return group_in_32_bits(w, column);
  const uint32_t group = static_cast<const uint32_t*>(g_idx)[column];
  const uint32_t last = w.columns == 0 ? 0 : group_in_32_bits(w, w.columns - 1);
  return group < last ? group : last;
}

// Returns log2 of the number of codes in a word, for codes of 2, 4 or 8 bits.
__device__ __forceinline__ int log2_codes(int bits) { return bits == 8 ? 2 : bits == 4 ? 3 : 4; }

// Returns the code with the number i, where `word` is the word that holds the code.
__device__ __forceinline__ int code_in_word(uint32_t word, int bits, int64_t i) {
  const int place = static_cast<int>(i) & ((1 << log2_codes(bits)) - 1);
  return static_cast<int>(word >> (place * bits) & ((1u << bits) - 1));
}

// The zero point and the scale of a group of a row.
struct ZeroAndScale {
  int zero;
  float scale;
};

template <>
struct OnCuda<IntRows> : IntRows {
  __device__ __forceinline__ static ZeroAndScale of_group(const PackedView& w, int64_t row, int64_t group) {
    const int bits = code_bits(w.option);
    const int64_t groups = w.group == 0 ? 1 : group_in_32_bits(w, w.columns);
    const int64_t index = has_one_scale(w) ? 0 : row * groups + group;
    ZeroAndScale found{is_plain(w) ? 0 : 1 << (bits - 1), float_scale(w, w.part[1], index)};
    if (w.part[2] == nullptr) return found;
    if (is_plain(w)) {
      found.zero = static_cast<const int8_t*>(w.part[2])[index];
    } else {
      const uint32_t word = static_cast<const uint32_t*>(w.part[2])[(row >> log2_codes(bits)) * groups + group];
      found.zero = code_in_word(word, bits, row);
    }
    return found;
  }

  __device__ __forceinline__ static const uint32_t* words(const PackedView& w, int64_t row) {
    const int log2 = log2_codes(code_bits(w.option));
    return static_cast<const uint32_t*>(w.part[0]) + row * ((w.columns + (1 << log2) - 1) >> log2);
  }

  __device__ __forceinline__ static float value(const PackedView& w, int64_t row, int64_t column) {
    const int bits = code_bits(w.option);
    const ZeroAndScale own = of_group(w, row, group_in_32_bits(w, w.part[3], column));
    const int code = is_plain(w) ? static_cast<const int8_t*>(w.part[0])[row * w.columns + column]
                                 : code_in_word(words(w, row)[column >> log2_codes(bits)], bits, column);
    return fmul_rn(static_cast<float>(code - own.zero), own.scale);
  }

  __device__ __forceinline__ static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]) {
    const bool whole = !is_plain(w) || w.columns % 8 == 0;  // whether the 8 codes can be loaded at once
    if (!whole || !one_group_in_8(w, w.part[3]))
      return one_by_one(out, [&](int k) { return value(w, row, column + k); });
    const ZeroAndScale own = of_group(w, row, group_in_32_bits(w, column));
    if (is_plain(w)) {
      const uint8_t* from = static_cast<const uint8_t*>(w.part[0]) + row * w.columns + column;
      const uint2 codes = eight_bytes(from, true);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        out[i] = fmul_rn(static_cast<float>(static_cast<int8_t>(byte_of(codes, i)) - own.zero), own.scale);
      return;
    }
    const int bits = code_bits(w.option);
    const uint32_t* from = words(w, row);
    const uint2 codes = eight_codes(bits, column, [&](int64_t i) { return from[i]; });
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = fmul_rn(static_cast<float>(code_of_8(codes, bits, i) - own.zero), own.scale);
  }
};

template <>
struct OnCuda<Gptq> : Gptq {
  __device__ __forceinline__ static ZeroAndScale of_group(const PackedView& w, int64_t row, int64_t group) {
    const int bits = code_bits(w.option), log2 = log2_codes(bits);
    const int64_t zeros = (w.rows + (1 << log2) - 1) >> log2;  // number of words that hold a group's zero points
    const uint32_t ones = bits == 8 ? 0x01010101u : bits == 4 ? 0x11111111u : 0x55555555u;
    const uint32_t word = static_cast<const uint32_t*>(w.part[2])[group * zeros + (row >> log2)];
    return {code_in_word(word + (format_flags(w.option) & kV1 ? ones : 0u), bits, row),
            float_scale(w, w.part[1], group * w.rows + row)};
  }

  __device__ __forceinline__ static float value(const PackedView& w, int64_t row, int64_t column) {
    const int bits = code_bits(w.option);
    const ZeroAndScale own = of_group(w, row, group_in_32_bits(w, w.part[3], column));
    const uint32_t word = static_cast<const uint32_t*>(w.part[0])[(column >> log2_codes(bits)) * w.rows + row];
    return fmul_rn(own.scale, static_cast<float>(code_in_word(word, bits, column) - own.zero));
  }

  __device__ __forceinline__ static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]) {
    if (!one_group_in_8(w, w.part[3])) return one_by_one(out, [&](int k) { return value(w, row, column + k); });
    const ZeroAndScale own = of_group(w, row, group_in_32_bits(w, column));
    const int bits = code_bits(w.option);
    const uint32_t* words = static_cast<const uint32_t*>(w.part[0]) + row;
    const uint2 codes = eight_codes(bits, column, [&](int64_t i) { return words[i * w.rows]; });
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = fmul_rn(own.scale, static_cast<float>(code_of_8(codes, bits, i) - own.zero));
  }
};

template <>
struct OnCuda<Awq> : Awq {
  __device__ __forceinline__ static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]) {
    if (!one_group_in_8(w, nullptr)) return one_by_one(out, [&](int k) { return value(w, row, column + k); });
    const int64_t group = group_in_32_bits(w, column), words = w.rows / 8;
    const int shift = shift_of(row);
    const uint32_t* from = static_cast<const uint32_t*>(w.part[0]) + column * words + row / 8;
    const uint32_t zero = static_cast<const uint32_t*>(w.part[2])[group * words + row / 8] >> shift & 15;
    const float scale = float_scale(w, w.part[1], group * w.rows + row);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out[i] =
          fmul_rn(static_cast<float>(static_cast<int>(from[i * words] >> shift & 15) - static_cast<int>(zero)), scale);
  }
};

template <>
struct OnCuda<Hqq> : Hqq {
  __device__ __forceinline__ static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]) {
    const int64_t flat = row * w.columns + column, half = w.rows * w.columns / 2;
    const bool bytes = code_bits(w.option) == 8;
    if (has_axis0(w) || w.group % 8 != 0 || w.columns % 8 != 0 || (!bytes && half % 8 != 0))
      return one_by_one(out, [&](int k) { return value(w, row, column + k); });
    const uint8_t* codes = static_cast<const uint8_t*>(w.part[0]);
    const uint2 words = eight_bytes(codes + (bytes || flat < half ? flat : flat - half), true);
    const int shift = !bytes && flat < half ? 4 : 0, mask = bytes ? 255 : 15;
    const int64_t group = flat / w.group;
    const ScaleType type = scale_type(w.option);
    const float scale = float_scale(w, w.part[1], group), zero = float_scale(w, w.part[2], group);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float code = static_cast<float>(static_cast<int>(byte_of(words, i)) >> shift & mask);
      out[i] = fmul_rn(rounded(fadd_rn(code, -zero), type), scale);
    }
  }
};

// Returns Number::value(code). A table of 16 values is held in four registers, because an array that is indexed would
// be in local memory.
template <typename Number>
__device__ __forceinline__ int number_of(int code) {
  if constexpr (Number::kTable) {
    const auto word = [](int first) {
      uint32_t bytes = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) bytes |= (static_cast<uint32_t>(Number::value(first + i)) & 255) << (8 * i);
      return bytes;
    };
    const uint32_t low = code & 4 ? word(4) : word(0), high = code & 4 ? word(12) : word(8);
    return static_cast<int8_t>((code & 8 ? high : low) >> (8 * (code & 3)) & 255);
  } else {
    return Number::value(code);
  }
}

// In a GGUF format, the 8 columns from a multiple of 8 on lie in one group of 16 columns of a block.
template <typename Block, typename Number>
struct OnCuda<Gguf<Block, Number>> : Gguf<Block, Number> {
  __device__ __forceinline__ static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]) {
    const int64_t block = (row * w.columns + column) / Block::kColumns;
    const uint8_t* b = static_cast<const uint8_t*>(w.part[0]) + block * Block::kBytes;
    const int place = static_cast<int>(column % Block::kColumns), g = place / 16, first = place % 16;
    const float scale = Block::scale(b, g);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out[i] = fmul_rn(scale, static_cast<float>(number_of<Number>(Block::code(b, g, first + i))));
    if constexpr (Block::kOffset) {
      const float offset = Block::offset(b, g);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = fadd_rn(out[i], offset);
    }
  }
};

template <typename Block, typename Number>
struct OnCuda<GgufNibbles<Block, Number>> : OnCuda<Gguf<Block, Number>> {};

}  // namespace
}  // namespace peft_ext
