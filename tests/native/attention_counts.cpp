// Counts the products of attention in bfloat16 by running the kernels for one head under a causal mask.
//
//   attention_counts TOKENS SIZE
//       prints "products loads stores dots" of the forward and of the backward: the numbers of AMX instructions that
//       multiply, load and store tiles, and the number of dot products of AVX512-BF16. TOKENS is a multiple of 64.
//
// With VECTORS defined, the kernels are those of AVX512-BF16, and otherwise those with emulated AMX tiles.
#if defined(__x86_64__)
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <utility>
#include <vector>

#include "cpu/target_avx512bf16.h"
// The headers below must be included after the target pragma.
#include "cpu/simd_avx512.h"

namespace {

struct Counts {
  long products, loads, stores, dots;
} counts;

}  // namespace

#define _mm512_dpbf16_ps(sums, a, b) (++counts.dots, _mm512_dpbf16_ps(sums, a, b))

#include "attention/transpose_avx512.h"
#include "attention/words_bf16.h"

#ifdef VECTORS
#include "attention/product.h"
#else
#include "linear/cpu/tiles/amx_emulated.h"
#undef AMX_LOAD
#undef AMX_LOAD_ROWS
#undef AMX_STORE_ROWS
#undef AMX_PRODUCT
#define AMX_LOAD(tile, base) (++counts.loads, amx_load(tile, base, 64))
#define AMX_LOAD_ROWS(tile, base, stride) (++counts.loads, amx_load(tile, base, stride))
#define AMX_STORE_ROWS(tile, base, stride) (++counts.stores, amx_store(tile, base, stride))
#define AMX_PRODUCT(sums, rows, lanes) (++counts.products, amx_product(sums, rows, lanes))
#include "attention/product_amx.h"
#endif

#include "attention/kernels_impl.h"

using namespace peft_ext;

namespace {

void print() {
  printf("%ld %ld %ld %ld\n", counts.products, counts.loads, counts.stores, counts.dots);
  counts = {};
}

void run(int64_t tokens, int64_t size) {
  const int64_t count = tokens * size;
  std::vector<bf16> heads[9];
  for (std::vector<bf16>& head : heads) head.resize(static_cast<size_t>(count), from_float<bf16>(0.5f));
  const auto of = [&](int i) { return HeadsOf{heads[i].data(), count, count, size}; };
  std::vector<float> lse(static_cast<size_t>(tokens)), key_sums(static_cast<size_t>(count)), value_sums = key_sums;
  std::vector<bf16> copies[4];
  for (std::vector<bf16>& copy : copies) copy.resize(static_cast<size_t>(count));
  Attention work = {};
  work.dtype = DType::kBF16;
  work.batches = work.heads = work.kv_heads = 1;
  work.queries = work.keys = tokens;
  work.size = work.value_size = size;
  work.scale = 0.1f;
  work.causal = true;
  work.q = of(0);
  work.k = of(1);
  work.v = of(2);
  work.out = of(3);
  work.grad = of(4);
  work.grad_q = of(5);
  work.grad_k = of(6);
  work.grad_v = of(7);
  work.lse = lse.data();
  work.splits = 1;
  work.reached = tokens;
  if (!kInPlace) {
    work.key_rows = copies[0].data();
    work.value_rows = copies[1].data();
  }
  work.key_columns = copies[2].data();
  work.value_columns = copies[3].data();
  size_t bytes = 64;
  for (const size_t needed : {pack_scratch(work), forward_scratch(work), backward_scratch(work)})
    bytes = needed > bytes ? needed : bytes;
  void* scratch = aligned_alloc(64, bytes);
  const int64_t blocks = tokens / kPlanBlock;
  pack(work, 0, blocks, scratch);
  for (int64_t block = 0; block < blocks; ++block) forward(work, {0, block}, scratch);
  print();
  work.key_sums = key_sums.data();
  work.value_sums = value_sums.data();
  backward(work, {0, 0, 0, 0, blocks, 0, blocks, true, true}, scratch);
  print();
  free(scratch);
}

}  // namespace

#include "cpu/target_end.h"

int main(int, char** arguments) { run(atol(arguments[1]), atol(arguments[2])); }
#endif
