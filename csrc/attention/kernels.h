// Scaled dot-product attention on the CPU: what each instruction set provides. Of one head, with i a query, j a key:
//
//   S = scale Q Kᵀ + bias   P = softmax(S) over the keys that i may see      O = (D ∘ P) V        lse = ln Σⱼ exp(S)
//   dV = (D ∘ P)ᵀ dO     dS = P ∘ (D ∘ (dO Vᵀ) - Σ dO ∘ O)                dQ = scale dS K      dK = scale dSᵀ Q
//
// D is 1 without dropout; with it 1 / (1 - p) for the keys that i keeps, else 0, by the draw of the flat index of
// [b, h, j, i] in [B, H, keys, queries].
//
// S, P and dS exist for a block at a time, transposed: a row is a key, the lanes of a vector are queries, so that the
// sums over keys are sums of rows. bfloat16 is multiplied by pairs where the CPU has its dot product, P and dS rounded
// to it; everything else is float32.
//
// Operands of a product, in words of 32 bits, each one float32 or two bfloat16 that follow each other in depth:
//   left   [rows, depth], a word is broadcast         right  [depth, lanes], a vector of words is loaded
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/philox.h"

namespace peft_ext {

// Queries that share a word of the mask.
constexpr int64_t kMaskBits = 64;

// [B, H, T, D], D in one piece.
struct HeadsOf {
  void* data;
  int64_t batch, head, token;  // strides
};

struct Attention {
  DType dtype;
  int64_t batches, heads, kv_heads, queries, keys;
  int64_t size, value_size;  // of a head of q and k, and of v
  float scale;
  bool causal;  // i sees j <= i
  HeadsOf q, k, v, out;
  float* lse;  // [B, H, queries]
  // Bit i of word i / 64 of a key: whether i sees it. Null: all of them. Strides in words, 0 where one serves all.
  const uint64_t* mask;
  int64_t mask_batch, mask_head, mask_key;
  // [B, H, queries, keys] of bias_dtype. Null: none. Strides in elements, 0 where one serves all.
  const void* bias;
  DType bias_dtype;
  int64_t bias_batch, bias_head, bias_query, bias_key;
  Dropout dropout;

  // Of the backward alone. The heads of a group are summed `splits` parts apart, then those.
  HeadsOf grad, grad_q, grad_k, grad_v;
  int64_t splits;
  float *key_sums, *value_sums;  // [splits, B, Hkv, keys, size or value_size up to whole vectors]

  // k and v as left operands, of each batch and kv head; null where they are not wanted, or taken where they lie.
  void *key_rows, *value_rows;        // [keys, size or value_size]
  void *key_columns, *value_columns;  // [size or value_size, keys]
};

struct AttentionKernels {
  DType element;  // what the operands are of
  int64_t word;   // elements in one
  int64_t width;  // of a vector: sums are padded to whole ones
  // Of the units [begin, end) of [B, Hkv]: the left operands.
  void (*pack)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*pack_scratch)(const Attention& work);
  // Of the units of [B, H, ceil(queries / 64)]: out and lse.
  void (*forward)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*forward_scratch)(const Attention& work);
  // Of the units of [B, Hkv, splits]: grad_q, key_sums and value_sums.
  void (*backward)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*backward_scratch)(const Attention& work);
  // Of the units of [B, Hkv, keys]: grad_k and grad_v.
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
