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
#include "weight/nf4_layout.h"

namespace peft_ext {

// Few tokens against many rows of an NF4 weight: y[t, n] = sum_k x[t, k] w[n, k], rows [begin, end) of w.
struct Nf4Skinny {
  const uint8_t* packed;
  const float* absmax;  // of the blocks from the one where row `begin` starts
  int block_shift;      // blocksize is 1 << block_shift: a division costs more than decoding a step
                        // blocksize and columns are multiples of kSkinnyStep: a step lies in one block and one row
  int64_t columns, rows;
  DType dtype;  // that each weight, or in the bfloat16 kernels its code, is rounded to
  int64_t tokens;
  const float* x;         // [tokens, columns]
  const bf16* x_ordered;  // [tokens, columns rounded up] in the order of a bfloat16 kernel
  float* y;               // [tokens, rows]
};

constexpr int64_t kSkinnyStep = 64;

// A run of double-quantized scales: out[i - begin] = code[codes[i]] * absmax[i / 256] + offset, each rounded.
struct Nf4Scales {
  const uint8_t* codes;
  const float* absmax;
  const float* code;  // [256]
  float offset;
};

struct Nf4Kernels {
  // x [n] of dtype -> packed [ceil(n/2)], absmax [blocks]. An odd n pads its last byte with the code of zero.
  void (*quantize)(const void* x, DType dtype, int64_t n, int64_t blocksize, int64_t begin, int64_t end,
                   uint8_t* packed, float* absmax);
  // absmax holds the scales of blocks [begin, end) only; out is the whole tensor.
  void (*dequantize)(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, int64_t begin,
                     int64_t end, void* out, DType dtype);
  // Null where this path has none. Above skinny_tokens, dequantize and multiply is as fast.
  void (*skinny)(const Nf4Skinny& work, int64_t begin, int64_t end);
  int64_t skinny_tokens;
  void (*decode_scales)(const Nf4Scales& scales, int64_t begin, int64_t end, float* out);
};

// Those of the CPU path in use.
const Nf4Kernels& nf4_kernels();

extern const Nf4Kernels kNf4KernelsScalar;
#if defined(__x86_64__)
extern const Nf4Kernels kNf4KernelsAvx2;
extern const Nf4Kernels kNf4KernelsAvx512;
// The skinny product for bfloat16 by AVX512-BF16's dot product; for other types, see kNf4KernelsAvx512.
void nf4_skinny_bf16_avx512(const Nf4Skinny& work, int64_t begin, int64_t end);
constexpr int64_t kSkinnyTokensBf16 = 12;
// A row of x in the order that it reads W's codes, zeros up to a whole group.
constexpr int64_t kNibbleGroup = 128;
inline int64_t nibble_columns(int64_t columns) { return ceil_div(columns, kNibbleGroup) * kNibbleGroup; }
void nf4_nibble_order(const bf16* x, int64_t columns, bf16* out);
#elif defined(__aarch64__)
extern const Nf4Kernels kNf4KernelsNeon;
// The skinny product for bfloat16 by its dot product; for other types, see kNf4KernelsNeon.
void nf4_skinny_bf16_neon(const Nf4Skinny& work, int64_t begin, int64_t end);
// A row of x in the order that it reads W's codes.
void nf4_order_bf16_neon(const bf16* x, int64_t columns, bf16* out);
#endif

}  // namespace peft_ext
