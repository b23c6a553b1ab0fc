// Kernels of DoRA for a mixture of experts, except for the product. The kernels compute the norm of each row of W_e + s
// B_e A_e, and in the backward G = g_e ∘ dY, from which dX is computed, and the gradient of g_e, Σ dY ∘ Z over the
// expert's rows, where Z is the output of the layer before the factor g_e and the bias.
#pragma once

#include "experts/cuda/stack_view.cuh"
#include "experts/cuda/stacks.cuh"
#include "linear/cuda/expand.cuh"

namespace peft_ext {

// --- the norm

struct StackNorm {
  StackView weight;                   // W_e of every expert e; a column of the view is a row of W_e
  Terms left, right;                  // bfloat16 terms of B_e and of A_eᵀ of expert 0, split as for a float32 result
  int64_t left_stride, right_stride;  // distances to the next expert's terms, in units of 16 bytes
  // ends of the experts' rows of x, see has_rows; an expert without rows of x gets norms of zero
  const int64_t* ends;
  float scaling;
  int64_t outputs, inputs;
  float* norm;  // [experts, outputs]
};

// Rounds two floats to the element type T; float32 stays as it is.
template <typename T>
__device__ __forceinline__ void round_pair(float& low, float& high) {
  if constexpr (sizeof(T) == 2) {
    const float2 rounded = unpack2<T>(pack2<T>(low, high));
    low = rounded.x;
    high = rounded.y;
  }
}

// The NF4 codes and scales that a lane reads of a tile of W: [h][half] is a group of eight codes and the group's scale.
// The group begins in row `row + 8 half` of W (`row` as in experts_norm_kernel), at column 32 h + 8 t of the tile.
struct NormCodes {
  uint32_t codes[2][2], stored[2][2];
  float nested[2][2];
};

// Loads eight elements of a row of an expert's W from column `first` on, with zeros beyond the last column. With
// kAlong, the elements of a dense row are contiguous.
template <typename T, bool kNf4, bool kAlong>
__device__ __forceinline__ void load_weights(const StackView& view, const T* dense, const Nf4View& nf4, int64_t row,
                                             int64_t first, int64_t inputs, float (&values)[kVector]) {
  if constexpr (!kNf4 && kAlong) {
    load_vector(dense + row * view.by_column + first, values);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = 0.0f;
      if (first + i >= inputs) continue;
      if constexpr (kNf4) {
        const int64_t flat = row * inputs + first + i;
        const uint8_t byte = nf4.packed[flat / 2];
        values[i] =
            fmul_rn(kNf4DeviceCode[flat % 2 == 0 ? byte >> 4 : byte & 15], nf4_scale(nf4, flat >> nf4.log2_blocksize));
      } else {
        values[i] = load_value(dense + row * view.by_column + (first + i) * view.by_inner);
      }
    }
    if constexpr (kNf4) {
#pragma unroll
      for (int i = 0; i < kVector; i += 2) round_pair<T>(values[i], values[i + 1]);
    }
  }
}

// A block of 4 warps computes the norms of 64 rows of an expert's W + s B A. A warp computes 16 of these norms, and
// reads the rows in tiles of 64 columns. Each element of s B_e A_e, computed as in expand_kernel, is added to the
// element of W_e, and the sum is squared. While the products for a tile run, a lane loads the tile's elements of a
// dense W, or, if kWhole, the NF4 codes and scales of the next tile. Sums are float32. Bytes moved: the W of each
// expert that has rows of x, once. Grid: x has a block for each tile of 64 rows of W; y has a block for each expert.
template <typename T, bool kNf4, bool kWhole>
__global__ void __launch_bounds__(kExpandThreads, 3) experts_norm_kernel(StackNorm work) {
  PEFT_EXT_KERNEL;
  constexpr bool kCodes = kNf4 && kWhole;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int64_t expert = blockIdx.y, row = static_cast<int64_t>(blockIdx.x) * kExpandTile + warp * 16 + g;
  Terms left = work.left;
  left.data += expert * work.left_stride;
  const uint4* right = work.right.data + expert * work.right_stride;
  const T* dense = static_cast<const T*>(work.weight.dense) + (kNf4 ? 0 : expert * work.weight.by_expert);
  const Nf4View nf4 = kNf4 ? nf4_of_expert(work.weight, expert) : Nf4View{};
  const auto tiles =
      static_cast<uint32_t>(has_rows(work.ends, expert) ? (work.inputs + kExpandTile - 1) / kExpandTile : 0);
  const int64_t steps = left.inner / 16;

  const auto inputs = static_cast<uint32_t>(work.inputs);
  [[maybe_unused]] const bool nested = kCodes && nf4.nested_absmax != nullptr;
  [[maybe_unused]] const float offset = nested ? *nf4.nested_offset : 0.0f;
  [[maybe_unused]] const float code = kCodes ? kNf4DeviceCode[lane % 16] : 0.0f;  // each lane holds one NF4 value
  const auto load_codes = [&](uint32_t tile, NormCodes& to) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t first = tile * kExpandTile + 32 * h + 8 * t;
        to.codes[h][half] = to.stored[h][half] = 0;
        to.nested[h][half] = 0.0f;
        if (first >= inputs || row + 8 * half >= work.outputs) continue;
        const uint32_t flat = static_cast<uint32_t>(row + 8 * half) * inputs + first,
                       block = flat >> nf4.log2_blocksize;
        to.codes[h][half] = load_streaming(reinterpret_cast<const uint32_t*>(nf4.packed + flat / 2));
        if (nested) {
          to.stored[h][half] = load_cached(static_cast<const uint8_t*>(nf4.absmax) + block);
          to.nested[h][half] = load_cached(nf4.nested_absmax + (block >> kLog2NestedBlock));
        } else {
          to.stored[h][half] = __float_as_uint(load_cached(static_cast<const float*>(nf4.absmax) + block));
        }
      }
  };
  // Each decoded element of W is round(code · scale), as in nf4_dequantize.
  const auto decode = [&](const NormCodes& from, int h, int half, bool there, float (&values)[kVector]) {
    float scale = __uint_as_float(from.stored[h][half]);
    if (nested) {
      scale = fmul_rn(load_cached(nf4.nested_code + from.stored[h][half]), from.nested[h][half]);
      scale = fadd_rn(scale, offset);
    }
    scale = there ? scale : 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      values[i] = fmul_rn(shuffle(code, from.codes[h][half] >> (4 * (i ^ 1)), 16), scale);
#pragma unroll
    for (int i = 0; i < kVector; i += 2) round_pair<T>(values[i], values[i + 1]);
  };

  [[maybe_unused]] NormCodes held;
  if constexpr (kCodes) {
    if (tiles > 0) load_codes(0, held);
  }
  float squares[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    float w[2][2][kVector];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t first = static_cast<int64_t>(tile) * kExpandTile + 32 * h + 8 * t, at = row + 8 * half;
        if constexpr (kCodes) {
          decode(held, h, half, first < work.inputs, w[h][half]);
        } else if (at < work.outputs && first < work.inputs) {
          load_weights<T, kNf4, kWhole>(work.weight, dense, nf4, at, first, work.inputs, w[h][half]);
        } else {
#pragma unroll
          for (int i = 0; i < kVector; ++i) w[h][half][i] = 0.0f;
        }
      }
    if constexpr (kCodes) {
      if (tile + 1 < tiles) load_codes(tile + 1, held);
    }
    // A new accumulator for each 64 ranks limits the rounding error, as in expand_kernel.
#pragma unroll 1
    for (int64_t first = 0; first < steps; first += 4) {
      float fresh[2][4][4] = {};
      const int64_t last = min_of(first + 4, steps);
#pragma unroll 1
      for (int64_t step = first; step < last; ++step)
        expand_product<float, kExpandLeftTerms<float>>(left, right, blockIdx.x * 4 + threadIdx.x / kWarpSize, tile,
                                                       step, fresh);
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            w[h][half][i] = fma_rn(work.scaling, fresh[h][i / 2][2 * half + i % 2], w[h][half][i]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < kVector; ++i) squares[half] = fma_rn(w[h][half][i], w[h][half][i], squares[half]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    squares[half] += shuffle_xor(squares[half], 1);
    squares[half] += shuffle_xor(squares[half], 2);
    if (t == 0 && row + 8 * half < work.outputs)
      work.norm[expert * work.outputs + row + 8 * half] = sqrtf(squares[half]);
  }
}

// --- G

struct ScaleRuns {
  const void* grad;    // dY [rows, columns] of type T, contiguous
  const void* z;       // Z [rows, columns] of type T, contiguous, or null
  const float* scale;  // g [experts, columns]
  const RowRun* tiles;
  int64_t columns;
  void* out;       // receives G, with zeros in rows that belong to no expert; null: no G
  float* partial;  // receives Σ dY ∘ Z over each tile's rows, [tiles, columns]; null without z
};

constexpr int kScaleThreads = 256;
constexpr int kScaleWarps = kScaleThreads / kWarpSize;
constexpr int kScaleColumns = kWarpSize * kVector;

struct ScaleShared {
  float sums[kScaleWarps][kScaleColumns];
};

// A block computes G and the sums Σ dY ∘ Z for a tile of 64 rows and 256 columns; a warp reads every eighth row of the
// tile, and a lane 8 columns. Grid: x has a block for each tile of rows; y has a block for each tile of columns. Bytes
// moved: dY and Z are read once, and G is written once.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kScaleThreads) scale_runs_kernel(ScaleRuns work) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(ScaleShared, shared);
  const RowRun run = work.tiles[blockIdx.x];
  if (run.rows == 0) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kScaleColumns + lane * kVector;
  const bool there = first < work.columns;
  float scale[kVector] = {}, sums[kVector] = {};
  if (there && run.expert >= 0)
    load_columns(work.scale + run.expert * work.columns, first, work.columns, kWhole, scale);
#pragma unroll 2
  for (int row = warp; row < run.rows; row += kScaleWarps) {
    if (!there) break;
    const int64_t at = (run.first + row) * work.columns;
    float values[kVector];
    load_columns(static_cast<const T*>(work.grad) + at, first, work.columns, kWhole, values);
    if (work.z != nullptr) {
      float z[kVector];
      load_columns(static_cast<const T*>(work.z) + at, first, work.columns, kWhole, z);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] = fma_rn(values[i], z[i], sums[i]);
    }
    if (work.out == nullptr) continue;
    // In rows that belong to no expert, dY may hold any values, NaN included: the kernel writes 0 to G there.
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = run.expert < 0 ? 0.0f : values[i] * scale[i];
    save_columns(static_cast<T*>(work.out) + at, first, work.columns, kWhole, values);
  }
  if (work.partial == nullptr) return;
#pragma unroll
  for (int i = 0; i < kVector; ++i) shared.sums[warp][i * kWarpSize + lane] = sums[i];
  sync_threads();
  const int column = threadIdx.x;
  const int64_t to = static_cast<int64_t>(blockIdx.y) * kScaleColumns + column;
  if (to >= work.columns) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kScaleWarps; ++i) sum += shared.sums[i][column % kVector * kWarpSize + column / kVector];
  work.partial[blockIdx.x * work.columns + to] = sum;
}

// Computes the gradient of each expert's g: the sum, in order, of the partial sums of the expert's tiles. The gradient
// of an expert without rows is zero.
struct ScaleReduce {
  const float* partial;
  const int32_t* first_tile;  // index of each expert's first tile, see RunTables
  int64_t columns;
  float* out;  // [experts, columns]
};

// Grid: x has ceil(columns / kStackThreads) blocks; y has a block for each expert.
static __global__ void __launch_bounds__(kStackThreads) scale_reduce_kernel(ScaleReduce work) {
  PEFT_EXT_KERNEL;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kStackThreads + threadIdx.x, expert = blockIdx.y;
  if (column >= work.columns) return;
  float sum = 0.0f;
  for (int32_t tile = work.first_tile[expert]; tile < work.first_tile[expert + 1]; ++tile)
    sum += work.partial[tile * work.columns + column];
  work.out[expert * work.columns + column] = sum;
}

}  // namespace peft_ext
