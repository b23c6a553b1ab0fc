// Declares the NF4 kernels on the CPU, and says what the kernels compute. Each instruction set has a table of these
// kernels.
//
//   absmax_b = max |w| over block b of the flat tensor       q_i = #{thresholds < w_i / absmax_b}
//   w_i = code[q_i] * absmax_b, float32, rounded once        packed: high nibble = even element
//
// In a full block, w_i / absmax_b is computed as w_i * (1 / max(absmax_b, 1e-38)); in an incomplete block at the end of
// the tensor, w_i is divided by max(absmax_b, 1e-38), which is also the stored scale. quantize and dequantize handle
// the blocks [begin, end) of a tensor of n elements. Blocks are independent, so that callers can divide the blocks
// among threads in any way without changing the results. blocksize is a multiple of 32, so that a block starts at a
// whole byte.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "weight/nf4_layout.h"

namespace peft_ext {

// Multiplies few tokens with the rows [begin, end) of an NF4 weight: y[t, n] = sum_k x[t, k] w[n, k].
// blocksize and columns are multiples of kSkinnyStep, so that a step of kSkinnyStep columns lies in one block and row.
struct Nf4Skinny {
  const uint8_t* packed;
  const float* absmax;  // the scales of W's blocks, beginning with the block that contains the start of row `begin`
  int block_shift;      // blocksize is 1 << block_shift: a shift is much faster than a division
  int64_t columns, rows;
  DType dtype;  // dtype to which decoded weights are rounded; the nf4_skinny_bf16 kernels do not read this field
  int64_t tokens;
  const float* x;         // [tokens, columns]
  const bf16* x_ordered;  // x [tokens, columns rounded up], in the order that a bfloat16 kernel needs
  float* y;               // [tokens, rows]
};

constexpr int64_t kSkinnyStep = 64;

// Double-quantized scales. decode_scales computes out[i - begin] = code[codes[i]] * absmax[i / 256] + offset for a
// range of i, and rounds each step.
struct Nf4Scales {
  const uint8_t* codes;
  const float* absmax;
  const float* code;  // [256]
  float offset;
};

// Smallest number of elements for which a thread is started: about 20 microseconds of work.
constexpr int64_t kDecodeGrain = 1 << 16;

struct Nf4Kernels {
  // Quantizes x [n] of dtype to packed [ceil(n/2)] and absmax [blocks]. For odd n the last nibble is the code of zero.
  void (*quantize)(const void* x, DType dtype, int64_t n, int64_t blocksize, int64_t begin, int64_t end,
                   uint8_t* packed, float* absmax);
  // Dequantizes the blocks [begin, end). absmax holds only the scales of the blocks [begin, end); out is the whole
  // dequantized tensor.
  void (*dequantize)(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, int64_t begin,
                     int64_t end, void* out, DType dtype);
  // `skinny` multiplies few tokens with an NF4 weight, and is null if the CPU path has no such kernel. For more than
  // skinny_tokens tokens, dequantizing the weight and multiplying with PyTorch is as fast.
  void (*skinny)(const Nf4Skinny& work, int64_t begin, int64_t end);
  int64_t skinny_tokens;
  void (*decode_scales)(const Nf4Scales& scales, int64_t begin, int64_t end, float* out);
};

// Returns the kernels of the current CPU path.
const Nf4Kernels& nf4_kernels();

extern const Nf4Kernels kNf4KernelsScalar;
#if defined(__x86_64__)
extern const Nf4Kernels kNf4KernelsAvx2;
extern const Nf4Kernels kNf4KernelsAvx512;
// The skinny product (few tokens with an NF4 weight) for bfloat16, by the dot product of AVX512-BF16. kNf4KernelsAvx512
// has the skinny product for float32 and float16, and for bfloat16 on the path avx512.
void nf4_skinny_bf16_avx512(const Nf4Skinny& work, int64_t begin, int64_t end);
constexpr int64_t kSkinnyTokensBf16 = 12;
// Permutes a row of x to the order in which nf4_skinny_bf16_avx512 reads W's codes, zero-padded to a multiple of
// kNibbleGroup.
constexpr int64_t kNibbleGroup = 128;
inline int64_t nibble_columns(int64_t columns) { return ceil_div(columns, kNibbleGroup) * kNibbleGroup; }
void nf4_nibble_order(const bf16* x, int64_t columns, bf16* out);
#elif defined(__aarch64__)
extern const Nf4Kernels kNf4KernelsNeon;
// The skinny product (few tokens with an NF4 weight) for bfloat16, by Arm's bfloat16 dot product. kNf4KernelsNeon has
// the skinny product for float32 and float16, and for bfloat16 on the path neon.
void nf4_skinny_bf16_neon(const Nf4Skinny& work, int64_t begin, int64_t end);
// Permutes a row of x to the order in which nf4_skinny_bf16_neon reads W's codes.
void nf4_order_bf16_neon(const bf16* x, int64_t columns, bf16* out);
#endif

}  // namespace peft_ext
