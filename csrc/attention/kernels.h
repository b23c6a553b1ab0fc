// The interface of the CPU kernels of attention; each instruction set has a table of kernels. The kernels compute, for
// one head, with query i and key j:
//
//   S = scale Q Kᵀ + bias;  P = softmax(S) over the keys that i may see;  O = (D ∘ P) V;  lse = ln Σⱼ exp(S);
//   dV = (D ∘ P)ᵀ dO;  dS = P ∘ (D ∘ (dO Vᵀ) - Σ dO ∘ O);  dQ = scale dS K;  dK = scale dSᵀ Q
//
// D is the factor of dropout: 1 without dropout; with dropout, 1 / (1 - p) if dropout keeps key j for query i, else 0.
// If query i may see no key, O and lse are 0. The random draw for query i and key j of head h in batch b is the draw of
// element [b, h, j, i] of a contiguous tensor [B, H, keys, queries].
//
// Except in the kernel for few queries (few.h), a thread holds S, P and dS for one block of queries and keys at a time,
// and transposed: a row is a key, and the lanes of a vector are queries, so that sums over keys are sums of rows. For
// bfloat16 tensors, except in the kernel for few queries, the paths avx512_bf16, amx and amx_emulated multiply bfloat16
// operands in pairs, and round P and dS to bfloat16. For float32 and float16 tensors, the paths avx512_bf16, amx and
// amx_emulated use the kernels for AVX-512. Scores, sums and lse are float32.
//
// Operands of products consist of 32-bit words. A word is one float32, or two bfloat16 that are adjacent in depth. A
// product broadcasts each word of the left operand [rows, depth], and loads vectors of words of the right operand
// [depth, lanes]. On AMX, the operands are tiles (attention/product_amx.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/philox.h"

namespace peft_ext {

constexpr int64_t kPlanBlock = 64;  // number of queries or keys in a block
constexpr int64_t kLeastStep = 2;   // each cell begins at a multiple of kLeastStep blocks of queries and of keys
constexpr int64_t kMaskBits = 64;   // number of queries whose mask bits for one key are in one word

// The unit of work of the forward that attention/plan.h divides among threads: a block of queries of one head.
struct ForwardUnit {
  int64_t head, block;  // head: index among the B · H query heads of all batches
};

// The unit of work of the backward, a cell: the blocks of queries [query, query_end) by the blocks of keys [key,
// key_end) of one query head. `head` is the head's index in its stream (attention/plan.h).
struct BackwardCell {
  int64_t stream, head;
  int64_t slot;  // index of the slot of Attention::query_sums that the stream uses
  int64_t query, query_end, key, key_end;
  bool first, last;  // whether the cell is the first, and the last, that adds to dQ of its queries
};

// kFewRows: largest number of rows in a unit of the kernel for few queries; a row is one query of one query head.
// kFewQueries: the largest number of queries of a head for which the kernel for few queries runs (only in a forward
// without dropout and bias).
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
  bool causal;  // if true, query i may see key j only if j <= i
  HeadsOf q, k, v, out;
  float* lse;  // lse [B, H, queries], written by the forward and read by the backward
  // The mask as words [B, H, blocks of 64 queries, keys]: bit i of a word tells whether query i of the block may see
  // the key. A null pointer `mask` means that the call has no mask in the form of words. The strides mask_batch and
  // mask_head are in words, and 0 for a broadcast dimension.
  const uint64_t* mask;
  int64_t mask_batch, mask_head;
  // The mask as bytes, which only the kernel for few queries reads. A null pointer `seen` means that the call has no
  // mask in the form of bytes. The strides seen_batch to seen_key are in bytes, and 0 for a broadcast dimension.
  const uint8_t* seen;
  int64_t seen_batch, seen_head, seen_query, seen_key;
  // The bias [B, H, queries, keys] in bias_dtype, or null. The strides bias_batch to bias_key are in elements, and 0
  // for a broadcast dimension.
  const void* bias;
  DType bias_dtype;
  int64_t bias_batch, bias_head, bias_query, bias_key;
  Dropout dropout;

  // Only the backward uses the fields from `grad` to `query_sums`. The query heads of a key head are divided into
  // `splits` parts, each with its own sums of dK and dV; `finish` adds the sums of the parts.
  HeadsOf grad, grad_q, grad_k, grad_v;
  int64_t splits;
  // sums of dK and dV: [splits, B, Hkv, keys, size or value_size padded to whole vectors]
  float *key_sums, *value_sums;
  // Number of keys that are in at least one cell: a multiple of 64, or all keys. The first of the cells with the same
  // keys that a stream computes sets key_sums and value_sums of these keys to zero, because the memory is then in the
  // cache of the thread that adds to the sums.
  int64_t reached;
  // Sums of dQ, [slots, blocks of queries, size, 64], one slot for each of the streams that run at the same time; null
  // if each head is one cell (attention/plan.h).
  float* query_sums;

  // Scratch copies of k and v for each batch and key head, as left operands of products: key_rows and value_rows are as
  // stored, key_columns and value_columns are transposed. Each of the four pointers is null if no product of the call
  // reads the copy, or if the products read k or v in place.
  void *key_rows, *value_rows;        // copies of k and v, [keys, size or value_size]
  void *key_columns, *value_columns;  // transposed copies of k and v, [size or value_size, keys]
};

struct AttentionKernels {
  DType element;      // element type of the operands of products
  int64_t left_rows;  // the number of rows of the copies of k and v is padded to a multiple of left_rows
  int64_t depth;      // the depth of operands is padded to a multiple of `depth`
  bool in_place;      // whether a product can read rows of k and v in place, if their depth needs no padding
  int64_t width;      // number of elements in a vector; rows of sums are padded to whole vectors
  // Prepares the units [begin, end) of the B · Hkv · ceil(keys / 64) blocks of keys: writes the copies of k and v whose
  // pointers are not null (key_rows, value_rows, key_columns, value_columns), and in the backward sets key_sums and
  // value_sums to zero for the keys that no cell reaches.
  void (*pack)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*pack_scratch)(const Attention& work);
  // Computes out and lse for a block of 64 queries of one head.
  void (*forward)(const Attention& work, ForwardUnit unit, void* scratch);
  size_t (*forward_scratch)(const Attention& work);
  // Computes out and lse for the units [begin, end) of few queries, without dropout and bias. A unit has up to kFewRows
  // of the H / Hkv · T queries of a key head, so that there are B · Hkv · ceil(H / Hkv · T / kFewRows) units.
  void (*few)(const Attention& work, int64_t begin, int64_t end, void* scratch);
  size_t (*few_scratch)(const Attention& work);
  // Adds the terms of one cell to key_sums, value_sums and the sums of dQ. The last cell of a row of cells also writes
  // grad_q. The streams (see attention/plan.h) are numbered in the order [B, Hkv, splits].
  void (*backward)(const Attention& work, const BackwardCell& cell, void* scratch);
  size_t (*backward_scratch)(const Attention& work);
  // Computes grad_k and grad_v from key_sums and value_sums, for the rows [begin, end) of the B · Hkv · keys rows.
  void (*finish)(const Attention& work, int64_t begin, int64_t end);
};

extern const AttentionKernels kAttentionKernelsScalar;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionKernelsAvx2;
extern const AttentionKernels kAttentionKernelsAvx512;
extern const AttentionKernels kAttentionKernelsAvx512Bf16;
extern const AttentionKernels kAttentionKernelsAmx;
extern const AttentionKernels kAttentionKernelsAmxEmulated;
#elif defined(__aarch64__)
extern const AttentionKernels kAttentionKernelsNeon;
#endif

// Returns the kernels for the current CPU path, and for q, k and v of `dtype`.
const AttentionKernels& attention_kernels(DType dtype);

}  // namespace peft_ext
