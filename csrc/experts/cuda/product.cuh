// The product of a mixture of experts. One launch multiplies each row of D with the weight of the row's expert, adds
// the low-rank term and the bias, and applies DoRA's scale:
//
//   out [rows, C] = g_e ∘ (D W_eᵀ + mask ∘ (L F_eᵀ)) + b_e,   D [rows, I],  W_e [C, I],  L [rows, R],  F_e [C, R]
//
// g is the output scale of DoRA, and 1 without DoRA. If the field z is given, the kernel also stores D W_eᵀ + mask ∘ (L
// F_eᵀ), the value that g multiplies. In the forward, D is x, W_e is the weight, L is s S with the scaling s and S =
// dropout(x) A_eᵀ, F_e is B_e, and there is no mask. For dX, D is dY (with DoRA g ∘ dY), W_e is the transposed weight,
// L is P = s D B_e / (1 - p) with the dropout rate p, F_e is A_e's transpose, and mask is dropout's mask. W is dense,
// with any strides, or NF4, which the kernel decodes. The contiguous dimension of W is the summed dimension (kAlong) or
// the columns (kAcross); for other strides, sizes and alignments the elements are loaded one by one (kAny). Rows that
// belong to no expert are set to zero.
//
// A thread block of 8 warps computes a tile of 64 rows of one expert and 128 columns. In a 16-bit dtype, warp w
// computes 32 x 32 outputs: the rows from 32 (w % 2) on and the columns from 32 (w / 2) on. In float32, warp w computes
// 8 rows and all columns of the tile. The kernel skips the products of a group of 16 rows (in float32: 8 rows) of a
// tile if the expert has no row in this group.
//
// The thread blocks of one tile of rows are adjacent in the grid, so that L2 serves the repeated reads of D; the tiles
// of one expert are adjacent, so that L2 serves the repeated reads of the expert's W. The loop over the summed
// dimension goes through D and W in slabs. A slab is 128 bytes of each of the tile's rows of D, and the elements of W
// that are multiplied with these bytes. Slabs pass through two stages of shared memory: cp.async fills one stage while
// the products read the other stage. The codes of an NF4 W are loaded into registers three slabs ahead and are decoded
// one slab ahead, each code to round(code · scale) as in nf4_dequantize. In a stage, the 16 bytes with the number
// `group` in a line are stored at place group ^ line % 8 of the line, so that ldmatrix has no bank conflicts. 16-bit
// dtypes use mma.sync with float32 sums. float32 uses FMAs, where a thread computes 8 rows and 4 columns. At the end,
// each warp reads the sums of the product from shared memory, adds the low-rank term, which is computed as in
// expand.cuh, rounds once, and stores 8 elements per lane and row. Shared memory: 48 KiB. Bytes moved: D, W (of experts
// that have rows), out, and z if given, once each. From L2, D is read C / 128 times, and W once per 64 rows.
#pragma once

#include "experts/cuda/stack_view.cuh"
#include "linear/cuda/expand.cuh"

namespace peft_ext {

constexpr int kProductThreads = 256;
constexpr int kProductColumns = 128;
constexpr int kProductRowBytes = 128;  // bytes of a row of D in a stage of shared memory; W's with kAlong too
template <typename T>
constexpr int kProductSlab = kProductRowBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kProductVector = 16 / static_cast<int>(sizeof(T));

// The contiguous dimension of W: the summed dimension (kAlong), the columns of the result (kAcross), or none that
// allows loads of 16 bytes (kAny).
enum class StackOrder { kAlong, kAcross, kAny };

struct ExpertsProduct {
  void* out;         // receives the result [rows, columns] of type T
  const void* left;  // D, contiguous
  StackView weight;
  const RowRun* tiles;
  int64_t columns, inner, column_tiles;
  const void* bias;       // b [experts, columns] of type T; null: no bias
  const float* scale;     // g [experts, columns]; null without DoRA
  void* z;                // receives the value [rows, columns] that g scales; null if unneeded
  Terms low_left;         // bfloat16 terms of L, in the order of the tiles; `data` is null: no low-rank term
  Terms low_right;        // bfloat16 terms of F_e of expert 0
  int64_t right_stride;   // distance to the terms of the next expert's F_e, in units of 16 bytes
  const uint32_t* kept;   // bits of dropout's mask, as a rank pass writes them; null: the mask is drawn again
  DeviceDropout dropout;  // parameters of dropout, from which the mask is drawn; not active: no mask
};

struct ProductShared {
  unsigned char bytes[2 * (kTileRows + kProductColumns) * kProductRowBytes];
};
constexpr int kProductStage = sizeof(ProductShared) / 2;
constexpr int kProductRight = kTileRows * kProductRowBytes;  // offset of W's bytes in a stage of shared memory
constexpr int kMeetingRow = kProductColumns + 8;             // number of floats in a row of sums in shared memory

// Returns the offset in a stage of shared memory of the 16 bytes with the number `group` in a line of kLine bytes.
template <int kLine>
__device__ __forceinline__ uint32_t group_at(int line, int group) {
  return line * kLine + (group ^ line % 8) * 16;
}

template <typename T>
__device__ __forceinline__ void store_group(SharedAt to, const float* values) {
  if constexpr (sizeof(T) == 4) {
    store_shared_16(to, make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                                   __float_as_uint(values[3])));
  } else {
    store_shared_16(to, make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                                   pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7])));
  }
}

// The NF4 codes of W that a thread decodes for a slab (half a slab of consecutive elements), and the codes' scale as it
// is stored: a float, or an 8-bit code and its nested absmax.
template <typename T>
struct ProductCodes {
  static constexpr int kWords = kProductSlab<T> / 16;  // number of 32-bit words, each with eight NF4 codes
  uint32_t words[kWords];
  uint32_t stored;
  float nested;
};

// The sums that a lane holds of the product in a 16-bit dtype: [2 groups of 16 rows][4 groups of 8 columns][4
// elements].
using ProductSums = float[2][4][4];

template <typename T, StackOrder kOrder>
__device__ __forceinline__ void product_of_stage(SharedAt stage, int warp, int rows, ProductSums& sums) {
  const int lane = threadIdx.x % kWarpSize;
  const int first_row = warp % 2 * 32, first_column = warp / 2 * 32;
  if (first_row >= rows) return;
  const bool both = first_row + 16 < rows;
  const SharedAt left = stage + ((first_row + lane % 16) * kProductRowBytes + (lane / 16 ^ lane % 8) * 16);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t a[2][4], b[2][4];
    ldmatrix_x4(a[0], left ^ step * 32);
    if (both) ldmatrix_x4(a[1], (left ^ step * 32) + 16 * kProductRowBytes);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const SharedAt right = stage + kProductRight;
      if constexpr (kOrder == StackOrder::kAcross) {
        constexpr int kLine = kProductColumns * 2;
        const int line = step * 16 + lane / 8 % 2 * 8 + lane % 8;
        ldmatrix_x4_trans(b[pair], right + group_at<kLine>(line, (first_column + pair * 16) / 8 + lane / 16));
      } else {
        const int line = first_column + pair * 16 + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(b[pair], right + group_at<kProductRowBytes>(line, step * 2 + lane / 8 % 2));
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m == 1 && !both) continue;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t of_tile[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        mma_m16n8k16<T>(sums[m][n], a[m], of_tile);
      }
    }
  }
}

// The sums that a thread holds of the product in float32: [i][j] is row 8 warp + i, column lane + 32 j of the tile.
using ProductSumsFloat = float[8][4];

__device__ __forceinline__ float4 load_floats(SharedAt from) {
  const uint4 words = load_shared_16(from);
  return make_float4(__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
                     __uint_as_float(words.w));
}

template <typename T, StackOrder kOrder>
__device__ __forceinline__ void product_of_stage(SharedAt stage, int warp, int rows, ProductSumsFloat& sums) {
  const int first_row = warp * 8, lane = threadIdx.x % kWarpSize;
  if (first_row >= rows) return;
  const SharedAt right = stage + kProductRight;
#pragma unroll 1
  for (int four = 0; four < 8; ++four) {
    float w[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = lane + 32 * j;
      if constexpr (kOrder == StackOrder::kAcross) {
        constexpr int kLine = kProductColumns * 4;
#pragma unroll
        for (int k = 0; k < 4; ++k)
          w[j][k] =
              __uint_as_float(load_shared_4(right + (group_at<kLine>(four * 4 + k, column / 4) + column % 4 * 4)));
      } else {
        const float4 held = load_floats(right + group_at<kProductRowBytes>(column, four));
        w[j][0] = held.x, w[j][1] = held.y, w[j][2] = held.z, w[j][3] = held.w;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 x = load_floats(stage + group_at<kProductRowBytes>(first_row + i, four));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[i][j] = fma_rn(x.x, w[j][0], sums[i][j]);
        sums[i][j] = fma_rn(x.y, w[j][1], sums[i][j]);
        sums[i][j] = fma_rn(x.z, w[j][2], sums[i][j]);
        sums[i][j] = fma_rn(x.w, w[j][3], sums[i][j]);
      }
    }
  }
}

// Computes the outputs of 16 rows (per warp; four warps share the tile's 64 rows) and 64 columns from the product: adds
// the low-rank term, multiplies by g, adds the bias, and stores the result. before(row of the tile, column, values)
// writes the product D W_eᵀ for eight columns to `values`.
template <typename T, bool kWhole, typename Before>
__device__ __forceinline__ void finish_experts(const ExpertsProduct& work, const RowRun& run, int64_t row_tile,
                                               int64_t column_tile, const Before& before) {
  const int warp = threadIdx.x / kWarpSize % 4, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  if (column_tile * kExpandTile >= work.columns || warp * 16 >= run.rows) return;
  float sums[2][4][4] = {};
  const bool adapted = work.low_left.data != nullptr && run.expert >= 0;
  if (adapted) {
    const uint4* factor = work.low_right.data + run.expert * work.right_stride;
    // A new accumulator for each 64 ranks limits the rounding error, as in expand_kernel.
    const int64_t steps = work.low_left.inner / 16;
#pragma unroll 1
    for (int64_t first = 0; first < steps; first += 4) {
      float fresh[2][4][4] = {};
      const int64_t last = min_of(first + 4, steps);
#pragma unroll 1
      for (int64_t step = first; step < last; ++step)
        expand_product<T, kExpandLeftTerms<T>>(work.low_left, factor, static_cast<uint32_t>(row_tile * 4 + warp),
                                               static_cast<uint32_t>(column_tile), step, fresh);
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[h][j][i] += fresh[h][j][i];
    }
  }
  [[maybe_unused]] const Philox philox = kWhole ? Philox{} : load_philox(work.dropout, run.expert);
  const int64_t kept_tile = row_tile * ((work.columns + kExpandTile - 1) / kExpandTile) + column_tile;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t first = column_tile * kExpandTile + 32 * h + 8 * t;
    if (first >= work.columns) continue;
    float bias[kVector] = {};
    if (work.bias != nullptr && run.expert >= 0)
      load_columns(static_cast<const T*>(work.bias) + run.expert * work.columns, first, work.columns, kWhole, bias);
    const bool scaled = work.scale != nullptr && run.expert >= 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + g + 8 * half;
      if (row >= run.rows) continue;
      float values[kVector], product[kVector];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[2 * j] = sums[h][j][2 * half];
        values[2 * j + 1] = sums[h][j][2 * half + 1];
      }
      if (kWhole && work.kept != nullptr && adapted) {
        const uint32_t kept = work.kept[kept_tile * kRankThreads + (g + 8 * half) * 8 + h * 4 + t] << (4 * warp);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[2 * j] = __uint_as_float(__float_as_uint(values[2 * j]) & spread_sign<false>(kept << j));
          values[2 * j + 1] = __uint_as_float(__float_as_uint(values[2 * j + 1]) & spread_sign<true>(kept << j));
        }
      }
      if constexpr (!kWhole) {
        if (work.dropout.active) {
          const uint32_t kept = kept_elements(philox, (run.before + row) * work.columns + first, false);
#pragma unroll
          for (int i = 0; i < kVector; ++i) values[i] = (kept >> i) & 1u ? values[i] : 0.0f;
        }
      }
      before(row, first, product);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] += product[i];
      if (work.z != nullptr)
        save_columns(static_cast<T*>(work.z) + (run.first + row) * work.columns, first, work.columns, kWhole, values);
      if (scaled) {
        float scale[kVector];
        load_columns(work.scale + run.expert * work.columns, first, work.columns, kWhole, scale);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] *= scale[i];
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] += bias[i];
      save_columns(static_cast<T*>(work.out) + (run.first + row) * work.columns, first, work.columns, kWhole, values);
    }
  }
}

// Number of thread blocks that must fit on a multiprocessor; the launch bounds limit the registers of a thread so that
// these blocks fit.
template <typename T, bool kNf4, StackOrder kOrder>
constexpr int kProductBlocks =
    kOrder == StackOrder::kAny || (sizeof(T) == 4 && !kNf4 && kOrder == StackOrder::kAcross) ? 1 : 2;

// Grid: x has a block for each tile of columns of each tile of rows. The blocks of one tile of rows are adjacent in the
// grid.
template <typename T, bool kNf4, StackOrder kOrder>
__global__ void __launch_bounds__(kProductThreads, (kProductBlocks<T, kNf4, kOrder>))
    experts_product_kernel(ExpertsProduct work) {
  PEFT_EXT_KERNEL;
  constexpr int kSlab = kProductSlab<T>, kVectors = kProductVector<T>, kSize = sizeof(T);
  constexpr bool kWhole = kOrder != StackOrder::kAny, kAcross = kOrder == StackOrder::kAcross;
  // The length of a line of W in a stage, in bytes, and the number of groups of 16 bytes in a line.
  constexpr int kLine = kAcross ? kProductColumns * kSize : kProductRowBytes, kGroups = kLine / 16;
  PEFT_EXT_SHARED(ProductShared, shared);
  const int64_t row_tile = blockIdx.x / work.column_tiles, column_tile = blockIdx.x % work.column_tiles;
  const RowRun run = work.tiles[row_tile];
  if (run.rows == 0) return;
  const int64_t column = column_tile * kProductColumns;
  const int slabs = run.expert < 0 ? 0 : static_cast<int>((work.inner + kSlab - 1) / kSlab);
  const SharedAt base = shared_at(shared.bytes);
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  // A shuffle tells the compiler that `warp` is equal in all lanes.
  const int warp = shuffle(thread / kWarpSize, 0);

  // `left` and `right` point to the next 16 bytes of D and of a dense W that this thread copies, and left_to and
  // right_to to the places of these bytes in a stage. rows_left and inner_left are the numbers of rows and of summed
  // elements from the thread's first element of D to the end.
  const int line = thread / kGroups, group = thread % kGroups;
  constexpr int kLines = kProductThreads / kGroups;  // number of lines of W from one copy of this thread to the next
  const auto inner = static_cast<int>(work.inner), columns = static_cast<int>(min_of(work.columns - column, 1 << 30));
  const int64_t expert = run.expert < 0 ? 0 : run.expert;
  const T* left = static_cast<const T*>(work.left) + (run.first + thread / 8) * work.inner + thread % 8 * kVectors;
  // number of elements of D from one copy of this thread to the next, 32 rows below
  const auto left_step = static_cast<uint32_t>(32 * inner);
  const SharedAt left_to = base + group_at<kProductRowBytes>(thread / 8, thread % 8);
  const int rows_left = run.rows - thread / 8, inner_left = inner - thread % 8 * kVectors;
  // distance in elements between neighbouring lines of W in a slab
  const int64_t between = kAcross ? work.weight.by_inner : work.weight.by_column;
  [[maybe_unused]] const T* right = static_cast<const T*>(work.weight.dense) + expert * work.weight.by_expert;
  if constexpr (!kNf4 && kWhole)
    right += kAcross ? line * between + column + group * kVectors : (column + line) * between + group * kVectors;
  const int64_t right_step = kLines * between;
  const SharedAt right_to = base + (kProductRight + group_at<kLine>(line, group));
  [[maybe_unused]] const Nf4View own = kNf4 ? nf4_of_expert(work.weight, expert) : Nf4View{};

  // Starts loading slab `slab` of D, and of W unless kDecodes, into a stage. Calls of `issue` must pass the slabs in
  // order.
  const auto issue = [&](int slab, uint32_t stage) {
    const int first = slab * kSlab;
    if (slab < slabs) {
      if constexpr (kWhole) {
        const T* from = left;
#pragma unroll
        for (int j = 0; j < 2; ++j, from += left_step)
          cp_async_16(left_to + (stage + 32 * j * kProductRowBytes), from, first < inner_left && 32 * j < rows_left);
        left += kSlab;
        if constexpr (!kNf4) {
          from = right;
#pragma unroll
          for (int j = 0; j < 4; ++j, from += right_step) {
            const bool take = kAcross ? first + line + j * kLines < inner && group * kVectors < columns
                                      : first < inner_left && line + j * kLines < columns;
            cp_async_16(right_to + (stage + j * kLines * kLine), from, take);
          }
          right += kAcross ? kSlab * between : kSlab;
        }
      } else {
        float values[kVectors];
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int i = 0; i < kVectors; ++i) {
            const bool take = 32 * j < rows_left && first + i < inner_left;
            values[i] = take ? load_value(left + first + j * 32 * work.inner + i) : 0.0f;
          }
          store_group<T>(left_to + (stage + 32 * j * kProductRowBytes), values);
        }
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < kVectors; ++i) {
            const int k = first + group * kVectors + i;
            const int64_t element = (column + line + j * kLines) * work.weight.by_column + k * work.weight.by_inner;
            values[i] = 0.0f;
            if (line + j * kLines >= columns || k >= inner) continue;
            if constexpr (kNf4) {
              const uint8_t byte = own.packed[element / 2];
              values[i] = fmul_rn(kNf4DeviceCode[element % 2 == 0 ? byte >> 4 : byte & 15],
                                  nf4_scale(own, element >> own.log2_blocksize));
            } else {
              values[i] = load_value(right + element);
            }
          }
          store_group<T>(right_to + (stage + j * kLines * kLine), values);
        }
      }
    }
    cp_async_commit();
  };

  // For an NF4 weight whose sizes and alignments allow loads of 16 bytes (kDecodes), this thread decodes half a slab of
  // elements of a line, which share one scale.
  constexpr bool kDecodes = kNf4 && kWhole;
  constexpr int kHalf = kSlab / 2, kParts = (kAcross ? kProductColumns : kSlab) / kHalf;
  using Codes = ProductCodes<T>;
  const int code_line = thread / kParts, part = thread % kParts;
  const bool nested = kDecodes && own.nested_absmax != nullptr;
  const float offset = nested ? *own.nested_offset : 0.0f;
  // half_at is the position in W of the thread's next codes, in units of half a slab. No NF4 block ends within half a
  // slab.
  [[maybe_unused]] auto half_at =
      static_cast<uint32_t>((kAcross ? code_line * between + column : (column + code_line) * between) / kHalf + part);
  const int half_to_block = own.log2_blocksize - (kHalf == 32 ? 5 : 4);
  const bool line_there = kAcross ? part * kHalf < columns : code_line < columns;
  const int code_left = kAcross ? inner - code_line : inner - part * kHalf;
  // Loads the NF4 codes of slab `slab`. Calls of load_codes must pass the slabs in order.
  const auto load_codes = [&](int slab, Codes& to) {
    if (!line_there || slab * kSlab >= code_left) {
      to = Codes{};
      return;
    }
    const uint8_t* packed = own.packed + static_cast<int64_t>(half_at) * (kHalf / 2);
    const uint32_t block = half_at >> half_to_block;
    if constexpr (Codes::kWords == 4) {
      const uint4 words = load_streaming(reinterpret_cast<const uint4*>(packed));
      to.words[0] = words.x, to.words[1] = words.y, to.words[2] = words.z, to.words[3] = words.w;
    } else {
      const uint2 words = load_streaming(reinterpret_cast<const uint2*>(packed));
      to.words[0] = words.x, to.words[1] = words.y;
    }
    if (nested) {
      to.stored = load_cached(static_cast<const uint8_t*>(own.absmax) + block);
      to.nested = load_cached(own.nested_absmax + (block >> kLog2NestedBlock));
    } else {
      to.stored = __float_as_uint(load_cached(static_cast<const float*>(own.absmax) + block));
    }
    half_at += kAcross ? static_cast<uint32_t>(2 * between) : 2;
  };
  const float code = kNf4DeviceCode[thread % 16];  // each lane holds one of the 16 NF4 values
  const auto decode = [&](const Codes& from, uint32_t stage) {
    const float scale = nested ? fadd_rn(fmul_rn(load_cached(own.nested_code + from.stored), from.nested), offset)
                               : __uint_as_float(from.stored);
#pragma unroll
    for (int i = 0; i < Codes::kWords; ++i) {
      float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = fmul_rn(shuffle(code, from.words[i] >> (4 * (e ^ 1)), 16), scale);
#pragma unroll
      for (int half = 0; half < 8 / kVectors; ++half) {
        const int at = part * (kHalf / kVectors) + i * (8 / kVectors) + half;
        store_group<T>(base + (stage + kProductRight + group_at<kLine>(code_line, at)), values + half * kVectors);
      }
    }
  };

  using Sums = std::conditional_t<kSize == 4, ProductSumsFloat, ProductSums>;
  Sums sums = {};
  [[maybe_unused]] Codes even, odd;
  if (slabs > 0) issue(0, 0);
  if constexpr (kDecodes) {
    if (slabs > 0) {
      load_codes(0, even);
      load_codes(1, odd);
      decode(even, 0);
      load_codes(2, even);
    }
  }
  // Multiplies slab `slab`. `next` holds the NF4 codes of slab `slab` + 1; the step decodes these codes, and then loads
  // the codes of slab `slab` + 3 into `next`.
  const auto step = [&](int slab, uint32_t stage, [[maybe_unused]] Codes& next) {
    const uint32_t other = kProductStage - stage;
    issue(slab + 1, other);
    if constexpr (kDecodes) {
      if (slab + 1 < slabs) {
        decode(next, other);
        load_codes(slab + 3, next);
      }
    }
    cp_async_wait<1>();
    sync_threads();
    product_of_stage<T, kOrder>(base + stage, warp, run.rows, sums);
    sync_threads();  // after this barrier, the next step may fill the stage again
  };
  for (int slab = 0; slab < slabs; slab += 2) {
    step(slab, 0, odd);
    if (slab + 1 < slabs) step(slab + 1, kProductStage, even);
  }
  cp_async_wait<0>();

  float* meeting = reinterpret_cast<float*>(shared.bytes);
  if constexpr (kSize == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) meeting[(warp * 8 + i) * kMeetingRow + lane + 32 * j] = sums[i][j];
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float* to = meeting + (warp % 2 * 32 + m * 16 + g) * kMeetingRow + warp / 2 * 32 + n * 8 + 2 * t;
        *reinterpret_cast<float2*>(to) = make_float2(sums[m][n][0], sums[m][n][1]);
        *reinterpret_cast<float2*>(to + 8 * kMeetingRow) = make_float2(sums[m][n][2], sums[m][n][3]);
      }
  }
  sync_threads();
  finish_experts<T, kWhole>(work, run, row_tile, column_tile * 2 + warp / 4,
                            [&](int row, int64_t first, float (&values)[kVector]) {
                              load_vector(meeting + row * kMeetingRow + (first - column), values);
                            });
}

// Adds the low-rank term to a product that PyTorch has computed in `out`, multiplies by g, adds the bias, and sets rows
// that belong to no expert to zero. Grid: x has a block for each tile of 64 columns of each tile of rows.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kExpandThreads, sizeof(T) == 4 ? 3 : 4) experts_onto_kernel(ExpertsProduct work) {
  PEFT_EXT_KERNEL;
  const int64_t row_tile = blockIdx.x / work.column_tiles, column_tile = blockIdx.x % work.column_tiles;
  const RowRun run = work.tiles[row_tile];
  if (run.rows == 0) return;
  finish_experts<T, kWhole>(work, run, row_tile, column_tile, [&](int row, int64_t first, float (&values)[kVector]) {
    if (run.expert >= 0) {
      load_columns(static_cast<const T*>(work.out) + (run.first + row) * work.columns, first, work.columns, kWhole,
                   values);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = 0.0f;
    }
  });
}

}  // namespace peft_ext
