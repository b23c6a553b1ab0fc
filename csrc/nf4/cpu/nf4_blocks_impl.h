// Quantize and dequantize block by block, written once. Included after the target pragma, by a file that defines
//
//   float largest_of(const T* in, int64_t blocksize);                        of the magnitudes; a NaN wins
//   void encode(const T* in, int64_t blocksize, float inverse, uint8_t* packed);           the codes of in * inverse
//   void expand(const uint8_t* packed, float scale, int64_t count, T* out);  code * scale as T, a multiple of 32 of
//   them
#pragma once

#include "nf4/cpu/nf4_block.h"

namespace peft_ext {
namespace {

void quantize(const void* x, DType dtype, int64_t n, int64_t blocksize, int64_t begin, int64_t end, uint8_t* packed,
              float* absmax) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block * blocksize;
      const T* in = static_cast<const T*>(x) + start;
      uint8_t* out = packed + start / 2;
      if (n - start < blocksize) {
        quantize_tail(in, n - start, out, absmax + block);
        continue;
      }
      const float largest = largest_of(in, blocksize);
      absmax[block] = largest;
      encode(in, blocksize, 1.0f / (largest < kSmallestAbsmax ? kSmallestAbsmax : largest), out);
    }
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
