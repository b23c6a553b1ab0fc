// Multiplies up to 16 tokens with an NF4 weight, and applies the low-rank term, the output scale and the biases in the
// same launch:
//
//   y [T, N] = g ∘ (x Wᵀ + scaling (S ∘ rank_scale) Bᵀ + b₀) + b₁,   T <= 16,  S [T, R] given
//
// g is the output scale (of DoRA or IA3), b₀ is the bias that g also multiplies, and b₁ is the bias that g does not
// multiply. W is the A operand of mma.sync (16 outputs by 16 inputs) in the order in which W is stored. The inputs of
// an output may be summed in any order. Therefore, of a slab of 64 inputs of a row, lane t of the row's four lanes
// multiplies 16 consecutive inputs, which have 8 bytes. In step s the lane's inputs 16 t + 4 s … + 3 are the columns
// 2t, 2t + 1, 2t + 8, 2t + 9 of the fragment. The B operand has the inputs of x in the order of W's inputs, 16 bytes
// for two steps. One lookup in a table [256 bytes][32 lanes], which has no bank conflicts, turns a byte of W into two
// values of type T. The lookup table holds the NF4 values without scales. The product over a slab of 64 inputs is
// multiplied by the slab's scale in float32, which is nearer to the exact result than rounding each product of code and
// scale to T, as nf4_dequantize does. A thread block of 8 warps computes 16 columns of y for all tokens. Warp w
// multiplies the slabs w, w + 8, …, so that the warps together read the bytes of a row contiguously. The warps' sums
// are added in shared memory, in order, so that the kernel needs no partial sums in global memory and no second launch,
// and the order of the sum is equal on every GPU. Each warp loads the bytes of W four slabs ahead, and x one slab
// ahead, into registers. Lane t of a row's four lanes decodes the scale of every fourth slab of the warp, after loading
// the stored scale four slabs earlier. Shared memory: 32 KiB, for the table and then for the sums. Bytes moved: W once;
// x once per thread block, from L2 and L1.
#pragma once

#include "cuda/vector.cuh"
#include "nf4/cuda/nf4.cuh"

namespace peft_ext {

constexpr int kFewThreads = 256;
constexpr int kFewWarps = kFewThreads / kWarpSize;
constexpr int kFewRows = 16;  // number of outputs that a thread block computes
constexpr int kLog2FewSlab = 6;
constexpr int kFewSlab = 1 << kLog2FewSlab;  // number of inputs in a slab; the inputs of a slab share a scale
constexpr int kFewAhead = 4;                 // number of slabs that a warp loads ahead
constexpr int kFewTokens = 16;

// The lora_B, rank and scaling of the adapter of one token of a mixed batch.
struct TokenFactor {
  const void* lora_B;  // [outputs, rank]
  DType type;
  int32_t rank;  // 0: no adapter
  float scaling;
};

// The arguments of the operations that follow the product x Wᵀ for few tokens: the low-rank term, the output scale g
// (of DoRA or IA3) and the biases.
struct TokensFinish {
  // The adapters of the tokens of a mixed batch [tokens], which replace lora_B, lora_B_type, rank_scale and scaling.
  // `factors` is null if all tokens have the same adapter, or if none has an adapter.
  const TokenFactor* factors;
  int64_t rank;
  const float* s;      // S [tokens, rank]
  const void* lora_B;  // B [outputs, rank], of dtype lora_B_type
  DType lora_B_type;
  const float* rank_scale;  // rank_scale [rank]; null: all ones
  float scaling;
  const float* scale;       // scale g [outputs]; null: all ones
  const void* bias_before;  // bias b₀ [outputs] of type T, which g also multiplies, or null
  const void* bias_after;   // bias b₁ [outputs] of type T, which g does not multiply, or null
  void* y;                  // receives y [tokens, outputs] of type T
  void* z;                  // receives the value that g multiplies [tokens, outputs] of type T, with b₀; or null
};

struct FewWork {
  const void* x;   // x [tokens, inputs] of type T, aligned to 16 bytes
  Nf4View weight;  // NF4 weight, aligned to 8 bytes; inputs and blocksize are multiples of kFewSlab
  int64_t outputs, inputs;
  int tokens;
  TokensFinish finish;
};

struct FewShared {
  uint32_t words[256][kWarpSize];
};

// Computes output n for up to kTokens tokens, from token `first` on, of the `tokens` tokens. sums: the products x Wᵀ of
// these tokens for output n.
template <typename T, int kTokens>
__device__ __forceinline__ void finish_tokens(const TokensFinish& work, int64_t outputs, int64_t n, int first,
                                              int tokens, const float (&sums)[kTokens]) {
  float low_rank[kTokens] = {};
  if (work.factors != nullptr) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (first + i >= tokens) continue;
      const TokenFactor factor = work.factors[first + i];
#pragma unroll 2
      for (int64_t r = 0; r < factor.rank; ++r) {
        const float b = factor.scaling * load_value(factor.lora_B, factor.type, n * factor.rank + r);
        low_rank[i] += work.s[(first + i) * work.rank + r] * b;
      }
    }
  }
  const int64_t common = work.factors != nullptr ? 0 : work.rank;
#pragma unroll 2
  for (int64_t r = 0; r < common; ++r) {
    const float rho = work.scaling * (work.rank_scale == nullptr ? 1.0f : work.rank_scale[r]);
    const float b = rho * load_value(work.lora_B, work.lora_B_type, n * work.rank + r);
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      if (first + i < tokens) low_rank[i] += work.s[(first + i) * work.rank + r] * b;
  }
  const float scale = work.scale == nullptr ? 1.0f : work.scale[n];
  const float before = work.bias_before == nullptr ? 0.0f : load_value(static_cast<const T*>(work.bias_before) + n);
  const float after = work.bias_after == nullptr ? 0.0f : load_value(static_cast<const T*>(work.bias_after) + n);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (first + i >= tokens) continue;
    const int64_t at = (first + i) * outputs + n;
    const float z = sums[i] + low_rank[i] + before;
    if (work.z != nullptr) store_value(static_cast<T*>(work.z) + at, z);
    store_value(static_cast<T*>(work.y) + at, scale * z + after);
  }
}

// The scales of a lane's two rows while the scales are being loaded: the stored scales, and, if the scales are
// double-quantized, the two factors of each decoded scale.
template <bool kNested>
struct FewScales {
  using Stored = std::conditional_t<kNested, uint8_t, float>;
  Stored stored[2];
  float code[2], nested[2];

  __device__ __forceinline__ void load(const Nf4View& weight, const uint32_t (&block)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) stored[i] = load_cached(static_cast<const Stored*>(weight.absmax) + block[i]);
  }
  __device__ __forceinline__ void look_up(const Nf4View& weight, const uint32_t (&block)[2]) {
    if constexpr (kNested) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        code[i] = load_cached(weight.nested_code + static_cast<uint32_t>(stored[i]));
        nested[i] = load_cached(weight.nested_absmax + (block[i] >> kLog2NestedBlock));
      }
    }
  }
  __device__ __forceinline__ void get(float offset, float (&scales)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kNested) {
        scales[i] = fadd_rn(fmul_rn(code[i], nested[i]), offset);
      } else {
        scales[i] = stored[i];
      }
    }
  }
};

// kTiles: number of tiles of 8 tokens. Grid: ceil(outputs / kFewRows) thread blocks.
template <typename T, int kTiles, bool kNested>
__global__ void __launch_bounds__(kFewThreads, kTiles == 1 ? 3 : 2) nf4_few_tokens_kernel(FewWork work) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(FewShared, shared);
  // Because of the shuffle, the compiler knows that `warp`, and therefore the number of the loop's rounds, is equal in
  // all lanes.
  const int warp = shuffle(static_cast<int>(threadIdx.x / kWarpSize), 0);
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFewRows;
  const int slabs = static_cast<int>(work.inputs / kFewSlab), steps = (slabs - warp + kFewWarps - 1) / kFewWarps;
  // A lane beyond the last output or token computes the last output or token again, and the lane's result is not
  // stored.
  const uint8_t* codes[2];
  uint32_t row_slab[2];  // index of the first slab of each of the lane's two rows
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = min_of(first + g + 8 * i, work.outputs - 1) * work.inputs;
    codes[i] = work.weight.packed + (row + warp * kFewSlab + 16 * t) / 2;
    row_slab[i] = static_cast<uint32_t>(row / kFewSlab);
  }
  const T* x[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
    x[tile] =
        static_cast<const T*>(work.x) + min_of(tile * 8 + g, work.tokens - 1) * work.inputs + warp * kFewSlab + 16 * t;

  // Loads the codes of step `at` + `further`; the pointers `codes` point to step `at`. load_codes does nothing beyond
  // the last step.
  uint2 words[kFewAhead][2];
  const auto load_codes = [&](int at, int further, uint2(&to)[2]) {
    if (at + further >= steps) return;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      to[i] = load_streaming(reinterpret_cast<const uint2*>(codes[i] + further * (kFewWarps * kFewSlab / 2)));
  };
  uint4 tokens[kTiles][2];
  const auto load_x = [&](int at, int further) {
    if (at + further >= steps) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        tokens[tile][i] =
            load_cached(reinterpret_cast<const uint4*>(x[tile] + further * (kFewWarps * kFewSlab) + 8 * i));
  };
  // In every four steps, this lane decodes the scales of one slab. blocks_of returns the numbers of the NF4 blocks that
  // contain this slab of the lane's two rows.
  const int shift = work.weight.log2_blocksize - kLog2FewSlab;
  const auto blocks_of = [&](int step, uint32_t (&blocks)[2]) {
    const int mine = warp + (step + t) * kFewWarps, slab = mine < slabs ? mine : slabs - 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) blocks[i] = (row_slab[i] + slab) >> shift;
  };

#pragma unroll
  for (int step = 0; step < kFewAhead; ++step) load_codes(0, step, words[step]);
  load_x(0, 0);
  const float offset = kNested ? *work.weight.nested_offset : 0.0f;
  FewScales<kNested> ahead;
  uint32_t blocks[2];
  float scales[2];
  blocks_of(0, blocks);
  ahead.load(work.weight, blocks);
  ahead.look_up(work.weight, blocks);
  ahead.get(offset, scales);
  blocks_of(kFewAhead, blocks);
  ahead.load(work.weight, blocks);

  // Fills the lookup table: each warp writes the table's rows for 32 byte values, four rows in each round. A row has
  // 128 bytes, and contains the pair of values of one byte value once for each lane.
  {
    const int byte = warp * kWarpSize + lane;
    const uint32_t pair = pack2<T>(kNf4DeviceCode[byte >> 4], kNf4DeviceCode[byte & 15]);
    const SharedAt to = shared_at(&shared.words[warp * kWarpSize + lane / 8][lane % 8 * 4]);
#pragma unroll
    for (int round = 0; round < 8; ++round) {
      const uint32_t value = shuffle(pair, round * 4 + lane / 8);
      store_shared_16(to + round * 4 * kWarpSize * 4, make_uint4(value, value, value, value));
    }
  }
  sync_threads();
  const SharedAt table = shared_at(&shared);
  // Looks up byte number `byte` of a word of codes, and returns the pair of values. The rows of the table are 128 bytes
  // apart, and each lane reads its own word of a row.
  const auto pair_of = [&](uint32_t word, int byte) {
    const uint32_t shifted = byte == 0 ? word << 7 : word >> (8 * byte - 7);
    return load_shared_4(table + ((shifted & 0x7f80u) | lane * 4u));
  };

  float sums[kTiles][4] = {};
  for (int group = 0; group < steps; group += kFewAhead) {
    ahead.look_up(work.weight, blocks);
#pragma unroll
    for (int j = 0; j < kFewAhead; ++j) {
      if (group + j >= steps) break;  // the branch is uniform: all lanes of a warp have equally many steps
      const float upper = shuffle(scales[0], j, 4), lower = shuffle(scales[1], j, 4);
      float fresh[kTiles][4] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint2 held = words[j][i % 2];
          a[i] = pair_of(s < 2 ? held.x : held.y, s % 2 * 2 + i / 2);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint4 held = tokens[tile][s / 2];
          const uint32_t b[2] = {s % 2 == 0 ? held.x : held.z, s % 2 == 0 ? held.y : held.w};
          mma_m16n8k16<T>(fresh[tile], a, b);
        }
      }
      load_codes(group, j + kFewAhead, words[j]);
      load_x(group, j + 1);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][i] = fma_rn(i < 2 ? upper : lower, fresh[tile][i], sums[tile][i]);
    }
    ahead.get(offset, scales);
    blocks_of(group + 2 * kFewAhead, blocks);
    ahead.load(work.weight, blocks);
#pragma unroll
    for (int i = 0; i < 2; ++i) codes[i] += kFewAhead * kFewWarps * kFewSlab / 2;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) x[tile] += kFewAhead * kFewWarps * kFewSlab;
  }

  sync_threads();  // after this barrier, no thread reads the table any more
  float (&meeting)[kFewWarps][kFewTokens][kFewRows] =
      *reinterpret_cast<float (*)[kFewWarps][kFewTokens][kFewRows]>(&shared);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) meeting[warp][tile * 8 + 2 * t + i % 2][g + i / 2 * 8] = sums[tile][i];
  sync_threads();
  const int token = threadIdx.x / kFewRows, mine = threadIdx.x % kFewRows;
  if (token >= work.tokens || first + mine >= work.outputs) return;
  float sum[1] = {};
#pragma unroll
  for (int w = 0; w < kFewWarps; ++w) sum[0] += meeting[w][token][mine];
  finish_tokens<T, 1>(work.finish, work.outputs, first + mine, token, work.tokens, sum);
}

}  // namespace peft_ext
