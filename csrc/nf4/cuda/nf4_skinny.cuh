// Multiplies up to 64 tokens with an NF4 weight: Z [T, N] = x [T, K] Wᵀ. W is decoded during the product.
//
// W is the A operand of mma.sync (16 outputs by 16 inputs) in the order in which W is stored. The inputs of an output
// may be summed in any order. Therefore, of each 64 inputs of a row, lane t of the row's four lanes multiplies 16
// consecutive inputs, which have 8 contiguous bytes. In step s (16 of the 64 inputs) the lane's inputs 16 t + 4 s … + 3
// are the columns 2t, 2t + 1, 2t + 8, 2t + 9 of the fragment. The B operand has the inputs of x in the order of W's
// inputs, so that two steps read 16 contiguous bytes of a row of x.
//
// A thread block of 4 warps computes 128 outputs over a chunk of K, because the outputs of one weight alone give too
// few blocks for a GPU; a warp computes 32 outputs. cp.async copies slabs of 64 inputs into kSkinnyStages stages of
// shared memory. A stage has the bytes of W, each of which only the lane that copied the byte reads, and the rows of x,
// padded by 16 bytes, so that 16-byte loads of a quarter warp spread over all banks. A double-quantized scale needs two
// loads, one after the other: the first load is started two slabs ahead, the second load one slab ahead. Sums are
// float32. skinny_finish_kernel adds the partial sums [chunks of K][T][padded N] in order, and computes the low-rank
// term, the output scale g (of DoRA or IA3) and the biases. Weights are rounded to T, as in nf4_dequantize, before the
// multiplication. Bytes moved: W once, x once for each thread block, and the partial sums twice (in L2).
#pragma once

#include "cuda/vector.cuh"
#include "nf4/cuda/nf4_few_tokens.cuh"

namespace peft_ext {

constexpr int kSkinnyThreads = 128;
constexpr int kSkinnyRows = 128;  // number of outputs that a thread block computes
constexpr int kSkinnySlab = 64;   // number of inputs in a slab; a stage of shared memory holds one slab of W and of x
constexpr int kSkinnyStride = kSkinnySlab + 8;
constexpr int64_t kSkinnyTokens = 64;

struct Skinny {
  const void* x;   // x [tokens, inputs] of type T, aligned to 16 bytes
  Nf4View weight;  // NF4 weight, aligned to 8 bytes; inputs is a multiple of 32
  int64_t outputs, inputs;
  int tokens;
  int64_t slabs_per_chunk;
  float* partial;  // [chunks][tokens][padded_outputs]
  int64_t padded_outputs;
};

// Number of stages of shared memory: four, or three if there are eight tiles of 8 tokens, because four such stages
// would not fit into 48 KiB.
template <int kTokenTiles>
constexpr int kSkinnyStages = kTokenTiles == 8 ? 3 : 4;

template <typename T, int kTokenTiles>
struct SkinnyStage {
  uint2 codes[4][kSkinnyThreads];  // codes[part][thread] are codes of row row_of(part) of W, see nf4_skinny_kernel
  T x[kTokenTiles * 8][kSkinnyStride];
};

template <typename T, int kTokenTiles>
struct SkinnyShared {
  SkinnyStage<T, kTokenTiles> stage[kSkinnyStages<kTokenTiles>];
};

// Grid: x has a thread block for each kSkinnyRows outputs; y has one for each chunk of K.
template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kSkinnyThreads) nf4_skinny_kernel(Skinny work) {
  PEFT_EXT_KERNEL;
  using Shared = SkinnyShared<T, kTokenTiles>;
  constexpr int kStages = kSkinnyStages<kTokenTiles>;
  PEFT_EXT_SHARED(Shared, shared);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kSkinnyRows + warp * 32 + g;
  const int64_t first = blockIdx.y * work.slabs_per_chunk;
  const int64_t all = (work.inputs + kSkinnySlab - 1) / kSkinnySlab;
  const int64_t slabs = min_of(work.slabs_per_chunk, all - first);
  const float code = kNf4DeviceCode[lane % 16];

  const auto row_of = [&](int part) { return output + part / 2 * 16 + part % 2 * 8; };
  const auto issue = [&](int64_t slab) {
    if (slab < slabs) {
      SkinnyStage<T, kTokenTiles>& stage = shared.stage[slab % kStages];
      const int64_t input = (first + slab) * kSkinnySlab;
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const bool take = row_of(part) < work.outputs && input + 16 * t < work.inputs;
        const int64_t element = take ? row_of(part) * work.inputs + input + 16 * t : 0;
        cp_async_8(&stage.codes[part][threadIdx.x], work.weight.packed + element / 2, take);
      }
      for (int chunk = threadIdx.x; chunk < kTokenTiles * 64; chunk += kSkinnyThreads) {
        const int token = chunk / 8, column = chunk % 8 * 8;
        const bool take = token < work.tokens && input + column < work.inputs;
        const int64_t element = take ? token * work.inputs + input + column : 0;
        cp_async_16(&stage.x[token][column], static_cast<const T*>(work.x) + element, take);
      }
    }
    cp_async_commit();
  };
  // A lane loads the scales of its four rows of W, as they are stored, two slabs ahead. If the scales are
  // double-quantized, the lane looks up the values of the scales' codes one slab ahead.
  const bool nested = work.weight.nested_absmax != nullptr;
  const float offset = nested ? *work.weight.nested_offset : 0.0f;
  uint32_t stored[4] = {};
  float looked_up[4] = {}, nested_absmax[4] = {};
  const auto has_scale = [&](int64_t slab, int part) {
    return slab < slabs && row_of(part) < work.outputs && (first + slab) * kSkinnySlab + 16 * t < work.inputs;
  };
  const auto block_of = [&](int64_t slab, int part) {
    return (row_of(part) * work.inputs + (first + slab) * kSkinnySlab + 16 * t) >> work.weight.log2_blocksize;
  };
  const auto load_stored = [&](int64_t slab) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      if (!has_scale(slab, part)) continue;
      stored[part] = nested ? static_cast<const uint8_t*>(work.weight.absmax)[block_of(slab, part)]
                            : static_cast<const uint32_t*>(work.weight.absmax)[block_of(slab, part)];
    }
  };
  const auto look_up = [&](int64_t slab) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      if (!nested) looked_up[part] = __uint_as_float(stored[part]);
      if (!nested || !has_scale(slab, part)) continue;
      looked_up[part] = work.weight.nested_code[stored[part]];
      nested_absmax[part] = work.weight.nested_absmax[block_of(slab, part) >> kLog2NestedBlock];
    }
  };
  const auto get_scales = [&](int64_t slab, float (&scales)[4]) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float scale = nested ? fadd_rn(fmul_rn(looked_up[part], nested_absmax[part]), offset) : looked_up[part];
      scales[part] = has_scale(slab, part) ? scale : 0.0f;
    }
  };

  float sums[2][kTokenTiles][4] = {};
  float scales[4];
  for (int slab = 0; slab < kStages - 1; ++slab) issue(slab);
  load_stored(0);
  look_up(0);
  get_scales(0, scales);
  load_stored(1);
  for (int64_t slab = 0; slab < slabs; ++slab) {
    cp_async_wait<kStages - 2>();
    sync_threads();  // after the barrier, x of this slab is loaded, and no thread reads the previous stage
    issue(slab + kStages - 1);
    look_up(slab + 1);
    load_stored(slab + 2);
    const SkinnyStage<T, kTokenTiles>& stage = shared.stage[slab % kStages];
    uint2 codes[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) codes[part] = stage.codes[part][threadIdx.x];
#pragma unroll
    for (int two = 0; two < 2; ++two) {  // each iteration computes two steps of 16 inputs
      uint32_t a[2][2][4];               // a[m][step] is the A operand of tile m of 16 rows of W
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const uint32_t word = two == 0 ? codes[part].x : codes[part].y;
        uint32_t pairs[4];
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          const float high = shuffle(code, word >> (8 * byte + 4), 16), low = shuffle(code, word >> (8 * byte), 16);
          pairs[byte] = pack2<T>(fmul_rn(high, scales[part]), fmul_rn(low, scales[part]));
        }
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          a[part / 2][step][part % 2] = pairs[2 * step];
          a[part / 2][step][part % 2 + 2] = pairs[2 * step + 1];
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        const uint4 words = *reinterpret_cast<const uint4*>(&stage.x[tile * 8 + g][16 * t + 8 * two]);
        const uint32_t b0[2] = {words.x, words.y}, b1[2] = {words.z, words.w};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k16<T>(sums[m][tile], a[m][0], b0);
          mma_m16n8k16<T>(sums[m][tile], a[m][1], b1);
        }
      }
    }
    get_scales(slab + 1, scales);
  }

#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tile * 8 + 2 * t + i % 2;
        if (token >= work.tokens) continue;
        const int64_t at = (static_cast<int64_t>(blockIdx.y) * work.tokens + token) * work.padded_outputs;
        work.partial[at + output + m * 16 + i / 2 * 8] = sums[m][tile][i];
      }
}

// The partial sums of the product x Wᵀ, which skinny_finish_kernel reads.
struct SkinnySums {
  const float* partial;
  int64_t chunks, padded_outputs;
  int tokens;
  int64_t outputs;
};

constexpr int kFinishTokens = 8;  // number of tokens per thread; the thread reads a row of B once for all these tokens

// Adds the partial sums of the chunks of K, and then computes the operations of TokensFinish (nf4_few_tokens.cuh): the
// low-rank term, the output scale g (of DoRA or IA3) and the biases. Grid: x has ceil(outputs / kSkinnyThreads) thread
// blocks; y has ceil(tokens / kFinishTokens).
template <typename T>
__global__ void __launch_bounds__(kSkinnyThreads) skinny_finish_kernel(SkinnySums product, TokensFinish work) {
  PEFT_EXT_KERNEL;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kSkinnyThreads + threadIdx.x;
  if (n >= product.outputs) return;
  const int first = blockIdx.y * kFinishTokens;
  float sums[kFinishTokens] = {};
#pragma unroll 4
  for (int64_t chunk = 0; chunk < product.chunks; ++chunk) {
    const float* from = product.partial + (chunk * product.tokens + first) * product.padded_outputs + n;
#pragma unroll
    for (int i = 0; i < kFinishTokens; ++i)
      if (first + i < product.tokens) sums[i] += from[i * product.padded_outputs];
  }
  finish_tokens<T, kFinishTokens>(work, product.outputs, n, first, product.tokens, sums);
}

}  // namespace peft_ext
