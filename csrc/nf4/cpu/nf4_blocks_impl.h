// Quantizes and dequantizes NF4 blocks, in code that all CPU paths share. A file that includes this file after the
// target pragma must define:
//
//   float largest_of(const T* in, int64_t blocksize);
//     Returns the largest magnitude, or NaN if a value is NaN.
//   void encode(const T* in, int64_t blocksize, float inverse, uint8_t* packed);
//     Writes the NF4 codes of the values in[i] * inverse.
//   void expand(const uint8_t* packed, float scale, int64_t count, T* out);
//     Writes code * scale for `count` codes, a multiple of 32.
#pragma once

#include "nf4/cpu/nf4_block.h"

namespace peft_ext {
namespace {

// Up to kBlocksTogether full blocks are quantized together: a first loop computes absmax of all blocks, and a second
// loop computes all codes, so that no block waits for the division of the previous block. The elements of these blocks,
// at most 4,096, stay in L1 between the two loops.
constexpr int64_t kBlocksTogether = 16, kElementsTogether = 4096;

void quantize(const void* x, DType dtype, int64_t n, int64_t blocksize, int64_t begin, int64_t end, uint8_t* packed,
              float* absmax) {
  const int64_t together =
      blocksize * kBlocksTogether > kElementsTogether ? kElementsTogether / blocksize : kBlocksTogether;
  const int64_t whole = min_i64(end, n / blocksize);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(x);
    for (int64_t block = begin; block < whole; block += together) {
      const int64_t count = min_i64(together, whole - block);
      const T* from = in + block * blocksize;
      float inverse[kBlocksTogether] = {};
      for (int64_t i = 0; i < count; ++i) absmax[block + i] = inverse[i] = largest_of(from + i * blocksize, blocksize);
      for (float& value : inverse) value = 1.0f / (value < kSmallestAbsmax ? kSmallestAbsmax : value);
      for (int64_t i = 0; i < count; ++i)
        encode(from + i * blocksize, blocksize, inverse[i], packed + (block + i) * blocksize / 2);
    }
    if (whole < end)
      quantize_tail(in + whole * blocksize, n - whole * blocksize, packed + whole * blocksize / 2, absmax + whole);
  });
}

void dequantize(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, int64_t begin, int64_t end,
                void* out, DType dtype) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block * blocksize, count = min_i64(blocksize, n - start), whole = count / 32 * 32;
      const float scale = absmax[block - begin];
      T* to = static_cast<T*>(out) + start;
      expand(packed + start / 2, scale, whole, to);
      if (whole < count) dequantize_block(packed + start / 2, scale, whole, count - whole, to);
    }
  });
}

}  // namespace
}  // namespace peft_ext
