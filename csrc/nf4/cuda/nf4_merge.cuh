// Decodes an NF4 weight W, adds a low-rank product and scales the rows. W may also be given as decoded float32 values.
//   out[n, k] = round(g[n] · (code[q] · s_b + scaling · sum_r B[n, r] A[r, k])),  b as in nf4.cuh.
// If g is not given, there is no factor g[n].
// The packed codes and scales of W [N, K] are as in nf4.cuh; A [R, K], B [N, R] and g [N] are float32; out [N, K] is
// float32, bfloat16 or float16. K, N and R may have any size of 1 or more. A thread block computes a tile of 64 rows
// and 128 columns. A thread computes 4 rows, and in each row the columns 4c to 4c + 3 and 64 + 4c to 64 + 4c + 3 (c is
// the thread's number modulo 16), so that 16 lanes read A's rows in shared memory without bank conflicts and store 128
// (float32: 256) contiguous bytes. Shared memory contains two slabs of 16 ranks, each with A [16][128] and the
// transpose of B [16][64 + 4], 24.5 KiB in all. One slab is used while cp.async fills the other slab. The padding of B
// spreads the transposed writes over the banks and keeps 16-byte reads aligned. The arithmetic is float32: FMAs add the
// products of B and A in the order of r. The sum over r is multiplied by scaling, added to the rounded code · s_b, and
// multiplied by g, and each of these steps is rounded. The merged value is then rounded once to T, to nearest even.
// Bytes moved: as in nf4.cuh, plus 4RK + 4RN + 4N. Each tile reads 768 R bytes of A and B; all reads of an element but
// the first are from L2. An element needs R float32 FMAs: for more than a few ranks, the FMAs limit the speed, not the
// moved bytes.
#pragma once

#include "cuda/block_sum.cuh"
#include "cuda/ptx.cuh"
#include "nf4/cuda/nf4.cuh"

namespace peft_ext {

constexpr int kMergeRows = 64;      // number of rows of W in a tile
constexpr int kMergeColumns = 128;  // number of columns of W in a tile
constexpr int kMergeRanks = 16;     // number of ranks in a slab, a part of A and B that shared memory holds
constexpr int kMergePitch = kMergeRows + 4;
constexpr int kMergeThreads = 256;
constexpr int kMergeThreadRows = 4;
constexpr int kMergeChunk = 4;  // number of neighbouring columns in a chunk; a thread has kMergeChunks chunks in a row
constexpr int kMergeChunks = 2;
constexpr int kMergeLanes = kMergeColumns / (kMergeChunk * kMergeChunks);  // number of threads along a row of the tile
static_assert(kMergeLanes * (kMergeRows / kMergeThreadRows) == kMergeThreads, "the threads cover the tile once");
static_assert(kMergeThreads % kMergeRanks == 0 && kMergeThreads % kMergeColumns == 0, "threads stage whole rows");

struct Nf4Merge {
  Nf4View weight;
  const float* dense;  // decoded values of W [N, K], aligned to 16 bytes, in place of `weight`; or null
  int64_t rows, columns;
  int ranks;
  const float* lora_A;     // A [R, K], aligned to 16 bytes
  const float* lora_B;     // [N, R]
  const float* row_scale;  // [N] or null
  float scaling;
};

struct MergeSlab {
  float a[kMergeRanks][kMergeColumns];
  float b[kMergeRanks][kMergePitch];
};

// Starts copying the ranks [first, first + kMergeRanks) of A and B into a slab, with zeros beyond the sizes R, N and K.
template <bool kAligned>
__device__ __forceinline__ void merge_stage(const Nf4Merge& merge, MergeSlab& slab, int first, int64_t row,
                                            int64_t column) {
  // Neighbouring lanes copy neighbouring parts of a row of A, 16 or 4 bytes each.
  constexpr int kWidth = kAligned ? 4 : 1;
  constexpr int kAcross = kMergeColumns / kWidth, kDown = kMergeThreads / kAcross;
  const int k = threadIdx.x % kAcross * kWidth;
  int rank = threadIdx.x / kAcross;
  const float* a = merge.lora_A + (first + rank) * merge.columns + column + k;
#pragma unroll
  for (int i = 0; i < kMergeRanks / kDown; ++i) {
    const bool take = first + rank < merge.ranks && column + k < merge.columns;
    if (kAligned) {
      cp_async_16(&slab.a[rank][k], take ? a : merge.lora_A, take);
    } else {
      cp_async_4(&slab.a[rank][k], take ? a : merge.lora_A, take);
    }
    rank += kDown;
    a += kDown * merge.columns;
  }
  // Neighbouring lanes copy neighbouring elements of 64 bytes of a row of B, and write these elements to different rows
  // of the slab.
  constexpr int kRows = kMergeThreads / kMergeRanks;
  rank = threadIdx.x % kMergeRanks;
  int n = threadIdx.x / kMergeRanks;
  const float* b = merge.lora_B + (row + n) * merge.ranks + first + rank;
#pragma unroll
  for (int i = 0; i < kMergeRows / kRows; ++i) {
    const bool take = first + rank < merge.ranks && row + n < merge.rows;
    cp_async_4(&slab.b[rank][n], take ? b : merge.lora_B, take);
    n += kRows;
    b += static_cast<int64_t>(kRows) * merge.ranks;
  }
}

__device__ __forceinline__ void merge_store(float* out, const float (&values)[kMergeChunk]) {
  *reinterpret_cast<float4*>(out) = make_float4(values[0], values[1], values[2], values[3]);
}

template <typename T>
__device__ __forceinline__ void merge_store(T* out, const float (&values)[kMergeChunk]) {
  *reinterpret_cast<uint2*>(out) = make_uint2(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]));
}

// kAligned: whether K is a multiple of 4. If kAligned is true, a chunk of four columns starts at a whole byte of the
// codes, lies in one quantization block, lies either completely within K or completely beyond K, and is stored at once.
// Grid: ceil(N / 64) · ceil(K / 128) blocks of kMergeThreads, along K first. out is aligned to 16 bytes.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMergeThreads, 2) nf4_merge_kernel(Nf4Merge merge, T* out) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(MergeSlab[2], slabs);
  const int64_t across = (merge.columns + kMergeColumns - 1) / kMergeColumns;
  const int64_t tile_row = blockIdx.x / across * kMergeRows, tile_column = blockIdx.x % across * kMergeColumns;
  const int own_row = threadIdx.x / kMergeLanes * kMergeThreadRows;
  const int own_column = threadIdx.x % kMergeLanes * kMergeChunk;
  constexpr int kApart = kMergeChunk * kMergeLanes;  // distance in columns between a thread's two chunks

  merge_stage<kAligned>(merge, slabs[0], 0, tile_row, tile_column);
  cp_async_commit();
  // Loads codes and scales while the first slab is copied. A double-quantized scale needs two loads, one after the
  // other: the load of the scale's code, and the lookup of the code in nested_code.
  uint32_t codes[kMergeThreadRows];  // 16 bits of codes for each chunk of four columns
  float scales[kMergeThreadRows][kMergeChunks];
#pragma unroll
  for (int i = 0; i < kMergeThreadRows; ++i) {
    codes[i] = 0;
#pragma unroll
    for (int j = 0; j < kMergeChunks; ++j) {
      const int64_t row = tile_row + own_row + i, column = tile_column + own_column + j * kApart;
      const int64_t element = row * merge.columns + column;
      scales[i][j] = 0.0f;
      if (kAligned && merge.dense == nullptr && row < merge.rows && column < merge.columns) {
        codes[i] |= load_streaming(reinterpret_cast<const uint16_t*>(merge.weight.packed + element / 2)) << (16 * j);
        scales[i][j] = nf4_scale(merge.weight, element >> merge.weight.log2_blocksize);
      }
    }
  }

  float sums[kMergeThreadRows][kMergeChunks * kMergeChunk] = {};
  for (int first = 0, slab = 0; first < merge.ranks; first += kMergeRanks, slab ^= 1) {
    if (first + kMergeRanks < merge.ranks) {
      merge_stage<kAligned>(merge, slabs[slab ^ 1], first + kMergeRanks, tile_row, tile_column);
    }
    cp_async_commit();
    cp_async_wait<1>();
    sync_threads();
    const int ranks = merge.ranks - first < kMergeRanks ? merge.ranks - first : kMergeRanks;
#pragma unroll 4
    for (int rank = 0; rank < ranks; ++rank) {
      const float4 b = *reinterpret_cast<const float4*>(&slabs[slab].b[rank][own_row]);
      const float rows[kMergeThreadRows] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < kMergeChunks; ++j) {
        const float4 a = *reinterpret_cast<const float4*>(&slabs[slab].a[rank][own_column + j * kApart]);
        const float columns[kMergeChunk] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < kMergeThreadRows; ++i) {
#pragma unroll
          for (int c = 0; c < kMergeChunk; ++c) {
            float& sum = sums[i][j * kMergeChunk + c];
            sum = fma_rn(rows[i], columns[c], sum);
          }
        }
      }
    }
    sync_threads();  // no warp reads this slab any more, so the next round may fill it
  }

  const float code = kNf4DeviceCode[threadIdx.x % 16];
#pragma unroll
  for (int i = 0; i < kMergeThreadRows; ++i) {
    const int64_t row = tile_row + own_row + i;
    const bool row_in = row < merge.rows;
    const float row_scale = merge.row_scale != nullptr && row_in ? merge.row_scale[row] : 1.0f;
#pragma unroll
    for (int j = 0; j < kMergeChunks; ++j) {
      const int64_t column = tile_column + own_column + j * kApart;
      const int64_t element = row * merge.columns + column;
      float values[kMergeChunk];
#pragma unroll
      for (int c = 0; c < kMergeChunk; ++c) {
        uint32_t nibble = codes[i] >> (16 * j + 4 * (c ^ 1));  // the high nibble is the first element's code
        float scale = scales[i][j];
        const bool inside = row_in && column + c < merge.columns;
        if (!kAligned && merge.dense == nullptr && inside) {
          const uint32_t byte = merge.weight.packed[(element + c) / 2];
          nibble = (element + c) % 2 == 0 ? byte >> 4 : byte;
          scale = nf4_scale(merge.weight, (element + c) >> merge.weight.log2_blocksize);
        }
        // The shuffle ignores the bits above the nibble.
        float base = fmul_rn(shuffle(code, static_cast<int>(nibble), 16), scale);
        if (merge.dense != nullptr && inside) base = merge.dense[element + c];
        // If g is not given, row_scale is 1, and a product by 1 is exact.
        values[c] = fmul_rn(row_scale, fadd_rn(base, fmul_rn(merge.scaling, sums[i][j * kMergeChunk + c])));
      }
      if (kAligned) {
        if (row_in && column < merge.columns) merge_store(out + element, values);
      } else {
#pragma unroll
        for (int c = 0; c < kMergeChunk; ++c) {
          if (row_in && column + c < merge.columns) store_element(out + element + c, values[c]);
        }
      }
    }
  }
}

// The kernels below compute the error of requantizing a merged weight w: Σ (w' - w)² and Σ w², where w' is decoded from
// the new codes. A thread block sums every gridDim.x-th group of kErrorThreads elements. The number of thread blocks
// does not depend on the model of GPU. nf4_merge_error_sum_kernel adds the thread blocks' sums in order.
constexpr int kErrorThreads = 256;
constexpr int kErrorBlocks = 512;

using MergeErrorShared = BlockSums<kErrorThreads>[2];

// Writes the two sums of each thread block to partial [blocks][2].
static __global__ void __launch_bounds__(kErrorThreads)
    nf4_merge_error_kernel(Nf4View requantized, const float* merged, float* partial) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(MergeErrorShared, shared);
  float sums[2] = {};
  const int64_t step = static_cast<int64_t>(gridDim.x) * kErrorThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kErrorThreads + threadIdx.x; i < requantized.numel; i += step) {
    const int code = requantized.packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
    const float scale = nf4_scale(requantized, i >> requantized.log2_blocksize), value = merged[i];
    const float moved = fmul_rn(kNf4DeviceCode[code], scale) - value;
    sums[0] += moved * moved;
    sums[1] += value * value;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = block_sum<kErrorThreads>(sums[i], shared[i]);
    if (threadIdx.x == 0) partial[blockIdx.x * 2 + i] = sum;
  }
}

// Grid: one thread block of two threads.
static __global__ void nf4_merge_error_sum_kernel(const float* partial, int64_t blocks, double* out) {
  PEFT_EXT_KERNEL;
  double sum = 0.0;
  for (int64_t block = 0; block < blocks; ++block) sum += partial[block * 2 + threadIdx.x];
  out[threadIdx.x] = sum;
}

}  // namespace peft_ext
