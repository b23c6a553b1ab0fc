// The contract of the attention kernels on the CPU; each instruction set has a table of them. For one head, with query
// i and key j:
//
//   S = scale Q Kᵀ + bias   P = softmax(S) over the keys that i may see      O = (D ∘ P) V        lse = ln Σⱼ exp(S)
//   dV = (D ∘ P)ᵀ dO     dS = P ∘ (D ∘ (dO Vᵀ) - Σ dO ∘ O)                dQ = scale dS K      dK = scale dSᵀ Q
//
// D is 1 without dropout. With dropout D is 1 / (1 - p) for the keys that query i keeps, and 0 for the others. The draw
// is that of the flat index of [b, h, j, i] in [B, H, keys, queries].
//
// S, P and dS exist for one block at a time, and are transposed: a row is a key, and the lanes of a vector are queries,
// so that sums over keys are sums of rows. If the CPU has a bfloat16 dot product, bfloat16 is multiplied in pairs, and
// P and dS are rounded to bfloat16; all other values are float32.
//
// Operands of products consist of 32-bit words. A word is one float32, or two bfloat16 that are adjacent in depth:
//   left   [rows, depth], whose words are broadcast   right  [depth, lanes], of which vectors of words are loaded
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/philox.h"

namespace peft_ext {

// Number of queries in a word of the mask.
constexpr int64_t kMaskBits = 64;

// A tensor [B, H, T, D] whose last dimension is contiguous.
struct HeadsOf {
  void* data;
  int64_t batch, head, token;  // strides
};

struct Attention {
  DType dtype;
  int64_t batches, heads, kv_heads, queries, keys;
  int64_t size, value_size;  // head size of q and k, and of v
  float scale;
  bool causal;  // query i may see key j only if j <= i
  HeadsOf q, k, v, out;
  float* lse;  // [B, H, queries]
  // Bit i of word i / 64 of a key tells whether query i may see the key. Null: every query may see every key. Strides
  // are in words; a stride is 0 if the dimension is broadcast.
  const uint64_t* mask;
  int64_t mask_batch, mask_head, mask_key;
  // [B, H, queries, keys] of bias_dtype, or null. Strides are in elements; a stride is 0 if the dimension is broadcast.
  const void* bias;
  DType bias_dtype;
  int64_t bias_batch, bias_head, bias_query, bias_key;
  Dropout dropout;

  // For the backward only. The heads of a group are summed in `splits` parts, which are then added.
  HeadsOf grad, grad_q, grad_k, grad_v;
  int64_t splits;
  float *key_sums, *value_sums;  // [splits, B, Hkv, keys, size or value_size padded to whole vectors]

  // k and v as left operands, for each batch and kv head. Null if not needed, or if k and v themselves are used.
  void *key_rows, *value_rows;        // [keys, size or value_size]
  void *key_columns, *value_columns;  // [size or value_size, keys]
};

struct AttentionKernels {
  DType element;  // element type of the operands
  int64_t word;   // elements in a word
  int64_t width;  // elements in a vector: sums are padded to whole vectors
  // Makes the left operands of the units [begin, end) of [B, Hkv].
  void (*pack)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*pack_scratch)(const Attention& work);
  // Computes out and lse for units of [B, H, ceil(queries / 64)].
  void (*forward)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*forward_scratch)(const Attention& work);
  // Computes grad_q, key_sums and value_sums for units of [B, Hkv, splits].
  void (*backward)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*backward_scratch)(const Attention& work);
  // Computes grad_k and grad_v for units of [B, Hkv, keys].
  void (*finish)(const Attention& work, int64_t begin, int64_t end);
};

extern const AttentionKernels kAttentionKernelsScalar;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionKernelsAvx2;
extern const AttentionKernels kAttentionKernelsAvx512;
extern const AttentionKernels kAttentionKernelsAvx512Bf16;
#elif defined(__aarch64__)
extern const AttentionKernels kAttentionKernelsNeon;
#endif

}  // namespace peft_ext
