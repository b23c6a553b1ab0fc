// Decoders of 8 columns at a time for the CUDA kernels. A kernel calls
//
//   static void value8(const PackedView& w, int64_t row, int64_t column, float (&out)[8]);
//
// if OnCuda<Format> has the function, and calls `value` for each column otherwise. value8 gives the bits of `value` for
// 8 columns from a multiple of 8 on, all of which exist. The first weight's parts are aligned to 16 bytes; the parts of
// further weights of a stack follow without gaps. A format may have value8 itself, or get value8 here.
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
    uint2 codes = make_uint2(0, 0);
    if (w.columns % 8 == 0) {
      codes = load_cached(reinterpret_cast<const uint2*>(from));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        codes.x |= static_cast<uint32_t>(from[i]) << (8 * i);
        codes.y |= static_cast<uint32_t>(from[4 + i]) << (8 * i);
      }
    }
    const auto code = [codes](int i) { return (i < 4 ? codes.x : codes.y) >> (8 * (i % 4)) & 255; };
    const float factor = scale(w, row, column);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = e4m3_code_value(code(i));
    if (column_shift(w) >= 3) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = fmul_rn(out[i], factor);
      return;
    }
    // Blocks of 1, 2 or 4 columns. The loop rotates the values, because registers have no index.
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
      const float value = fmul_rn(out[0], scale(w, row, column + k));
#pragma unroll
      for (int i = 0; i < 7; ++i) out[i] = out[i + 1];
      out[7] = value;
    }
  }
};

}  // namespace
}  // namespace peft_ext
