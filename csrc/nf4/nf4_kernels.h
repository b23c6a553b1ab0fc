// NF4 on the CPU: what each instruction set provides.
//
//   absmax_b = max |w| over block b of the flat tensor       q_i = #{thresholds < w_i / absmax_b}
//   w_i = code[q_i] * absmax_b, float32, rounded once        packed: high nibble = even element
//
// Every function handles blocks [begin, end) of a tensor of n elements; blocks are independent, so callers split them
// over threads as they like and the bits do not change. blocksize is a multiple of 32, so a block starts on a byte.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

struct Nf4Kernels {
  // x [n] of dtype -> packed [ceil(n/2)], absmax [blocks]. An odd n pads its last byte with the code of zero.
  void (*quantize)(const void* x, DType dtype, int64_t n, int64_t blocksize, int64_t begin, int64_t end,
                   uint8_t* packed, float* absmax);
  // absmax holds the scales of blocks [begin, end) only; out is the whole tensor.
  void (*dequantize)(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, int64_t begin,
                     int64_t end, void* out, DType dtype);
};

extern const Nf4Kernels kNf4KernelsScalar;
#if defined(__x86_64__)
extern const Nf4Kernels kNf4KernelsAvx2;
extern const Nf4Kernels kNf4KernelsAvx512;
#endif

}  // namespace peft_ext
