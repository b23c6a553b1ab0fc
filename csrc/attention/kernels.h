// The contract of the attention kernels on the CPU; each instruction set has a table of kernels. For one head, with
// query i and key j:
//
//   S = scale Q Kᵀ + bias   P = softmax(S) over the keys that i may see      O = (D ∘ P) V        lse = ln Σⱼ exp(S)
//   dV = (D ∘ P)ᵀ dO     dS = P ∘ (D ∘ (dO Vᵀ) - Σ dO ∘ O)                dQ = scale dS K      dK = scale dSᵀ Q
//
// D is 1 without dropout. With dropout D is 1 / (1 - p) for the keys that query i keeps, and 0 for the others. The draw
// of query i and key j of head h in batch b is that of the flat index of [b, h, j, i] in [B, H, keys, queries].
//
// A thread holds S, P and dS for one block of queries and keys at a time, and transposed: a row is a key, and the lanes
// of a vector are queries, so that sums over keys are sums of rows. AVX512-BF16 multiplies bfloat16 operands in pairs,
// and P and dS are then rounded to bfloat16. Scores, sums and lse are float32.
//
// Operands of products consist of 32-bit words. A word is one float32, or two bfloat16 that are adjacent in depth:
//   left   [rows, depth], whose words are broadcast   right  [depth, lanes], of which vectors of words are loaded
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/philox.h"

namespace peft_ext {

// Number of queries whose bits of the mask share one word.
constexpr int64_t kMaskBits = 64;

// Number of queries of a unit of the kernel for few queries, and the largest number of queries of a head for which this
// kernel runs.
constexpr int64_t kFewRows = 4;
constexpr int64_t kFewQueries = 8;

// A tensor [B, H, T, D] whose last dimension is contiguous.
struct HeadsOf {
  void* data;
  int64_t batch, head, token;  // strides in elements
};

struct Attention {
  DType dtype;
  int64_t batches, heads, kv_heads, queries, keys;
  int64_t size, value_size;  // size: head size of q and k; value_size: head size of v
  float scale;
  bool causal;  // query i may see key j only if j <= i
  HeadsOf q, k, v, out;
  float* lse;  // lse [B, H, queries]
  // Bit i % 64 of word i / 64 of a key tells whether query i may see the key. A null pointer means that there is no
  // mask. Strides are in words; a stride is 0 if the dimension is broadcast.
  const uint64_t* mask;
  int64_t mask_batch, mask_head, mask_key;
  // The mask as bytes, for few queries alone. A null pointer means that there is no mask. A stride is 0 if the
  // dimension is broadcast.
  const uint8_t* seen;
  int64_t seen_batch, seen_head, seen_query, seen_key;
  // The bias [B, H, queries, keys] in bias_dtype, or null. Strides are in elements; a stride is 0 if the dimension is
  // broadcast.
  const void* bias;
  DType bias_dtype;
  int64_t bias_batch, bias_head, bias_query, bias_key;
  Dropout dropout;

  // The fields from `grad` to `value_sums` are for the backward only. The query heads of a key head are summed in
  // `splits` parts, and `finish` adds the sums of these parts.
  HeadsOf grad, grad_q, grad_k, grad_v;
  int64_t splits;
  // sums of dK and dV: [splits, B, Hkv, keys, size or value_size padded to whole vectors]
  float *key_sums, *value_sums;

  // Scratch copies of k and v, for each batch and key head, in the layout that the products read as their left operand
  // (rows), and of the transposes of k and v (columns). A pointer is null if no product of the call reads the copy, or
  // if the products read k or v in place.
  void *key_rows, *value_rows;        // [keys, size or value_size]
  void *key_columns, *value_columns;  // [size or value_size, keys]
};

struct AttentionKernels {
  DType element;  // element type of the operands
  int64_t word;   // number of elements in a word
  int64_t width;  // number of elements in a vector; rows of sums are padded to whole vectors
  // Writes the copies of k and v (key_rows, value_rows, key_columns, value_columns that are not null) for the key heads
  // [begin, end) of the B · Hkv key heads.
  void (*pack)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*pack_scratch)(const Attention& work);
  // Computes out and lse for the blocks [begin, end) of queries. A block has 64 queries of one head, so that there are
  // B · H · ceil(queries / 64) blocks.
  void (*forward)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*forward_scratch)(const Attention& work);
  // Computes out and lse for the units [begin, end) of few queries, without dropout and bias. A unit has kFewRows of
  // the H / Hkv · T queries of a key head, so that there are B · Hkv · ceil(H / Hkv · T / kFewRows) units.
  void (*few)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*few_scratch)(const Attention& work);
  // Computes grad_q, key_sums and value_sums for the units [begin, end) of the units [B, Hkv, splits].
  void (*backward)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*backward_scratch)(const Attention& work);
  // Computes grad_k and grad_v for the rows [begin, end) of the rows [B, Hkv, keys].
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
