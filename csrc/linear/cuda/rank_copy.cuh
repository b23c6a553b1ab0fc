// Loads tiles of D into a rank pass's shared memory: the arguments of a pass, the layout of a stage, and the loads that
// do not use cp.async. See rank_pass.cuh for the whole pass.
#pragma once

#include "linear/cuda/row_runs.cuh"
#include "linear/cuda/terms.cuh"
#include "nf4/cuda/nf4.cuh"

namespace peft_ext {

constexpr int kRankTile = kTileRows;  // number of rows, and of columns, in a tile of D
constexpr int kRankThreads = 128;

// The results of a pass. kGroupedRows: P for the rows of a RowTable (a mixed batch), where each tile has the factor F
// of its adapter. kRunRows: P, where each expert has its own factor. kRunColumns: Q for the rows of each expert
// (row_runs.cuh).
enum class RankWork { kRows, kRowsAndSquares, kColumns, kBoth, kBothAndDots, kGroupedRows, kRunRows, kRunColumns };

// Dropout of a pass: none, drawn, or drawn and kept as bits for a later pass.
enum class RankMask { kNone, kDrawn, kKept };

// Number of stages of a rank pass. A stage is a tile in shared memory. 48 KiB of shared memory hold only two float32
// tiles. An NF4 weight needs only two stages, because the codes of the next tile wait in registers.
template <typename T, bool kNf4>
constexpr int kRankStages = sizeof(T) == 4 || kNf4 ? 2 : 4;

template <typename T>
constexpr int kRankRow = sizeof(T) == 4 ? 72 * 4 : 64 * 2;  // number of bytes from one row of a stage to the next row

struct RankPass {
  const void* dense = nullptr;  // D as a contiguous matrix; null for an NF4 weight
  Nf4View nf4{};                // D as an NF4 weight, whose values are rounded to T
  int64_t rows = 0, columns = 0;
  const void* beside = nullptr;  // E, in the layout of D
  DeviceDropout dropout;
  Terms right;                   // F as terms: outer = ranks, inner = columns of D, both padded
  Terms left;                    // L as terms: outer = ranks, inner = rows of D, both padded
  int64_t row_tiles = 1;         // number of tiles of rows of D per thread block
  int64_t column_tiles = 1;      // number of tiles of columns of D per thread block
  int64_t padded_rank = 0;       // padded rank, the row length of the partial sums
  int64_t first_rank = 0;        // first rank that this launch computes
  float* row_sums = nullptr;     // partial sums of P, [column chunks][padded rows][padded_rank]
  float* squares = nullptr;      // partial sums of squares, [column chunks][padded rows]
  float* column_sums = nullptr;  // partial sums of Q, [row chunks][padded columns][padded_rank]
  float* dots = nullptr;         // partial sums of D ∘ E, [row chunks][padded columns]
  int64_t padded_rows = 0, padded_columns = 0;
  uint32_t* kept = nullptr;      // bits of the dropout mask: [row tiles][column tiles][kRankThreads], see kKeptBits
  RowTable table;                // kGroupedRows: the table of rows
  int64_t right_stride = 0;      // distance from one adapter's or expert's F to the next F, in units of 16 bytes
  const RowRun* runs = nullptr;  // kRunRows: runs of tiles; kRunColumns: runs of chunks, one per chunk of column_sums
};

// Layout of a mask's bits, which is the layout in which the threads of a rank pass draw the bits. Thread i of a tile
// has the rows 16 j + i / 8, j < 4, and the columns i % 8 · 8 … + 7. Bits 15 and 31 of the thread's word, after a shift
// to the left by 4 j + w, tell whether the elements 2 w and 2 w + 1 of row j are kept.
constexpr uint32_t kKeptBits = 0x80008000u;

// Shared memory in which the warps' dots are added.
template <bool kDots>
struct RankDots {};
template <>
struct RankDots<true> {
  float sums[kRankThreads / kWarpSize][kRankTile];
};

template <typename T, bool kNf4, bool kDots>
struct RankStages : RankDots<kDots> {
  unsigned char tile[kRankStages<T, kNf4>][kRankTile * kRankRow<T>];
};

// Returns the offset of eight adjacent elements in a stage.
template <typename T>
__device__ __forceinline__ uint32_t rank_offset(int row, int group) {
  if constexpr (sizeof(T) == 4) return row * kRankRow<T> + group * 32;
  return row * kRankRow<T> + (group ^ row % 8) * 16;
}

template <typename T>
__device__ __forceinline__ void save_stage(SharedAt to, const float (&values)[kVector]) {
  store_shared_16(to, make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                                 pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7])));
}

template <>
__device__ __forceinline__ void save_stage<float>(SharedAt to, const float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4)
    store_shared_16(to + i * 4, make_uint4(__float_as_uint(values[i]), __float_as_uint(values[i + 1]),
                                           __float_as_uint(values[i + 2]), __float_as_uint(values[i + 3])));
}

// Copies a tile of any shape and alignment from (row, column), element by element, and applies dropout to the tile.
// Rows from `rows` on are zeros. Dropout counts row i of D as row i + `drawn`. kTabled: `row` counts rows of the table,
// not of D.
template <typename T, bool kNf4, bool kTabled>
__device__ __forceinline__ void rank_copy_any(const RankPass& pass, const Philox& philox, SharedAt to, int64_t row,
                                              int64_t column, int64_t rows, int64_t drawn) {
  const int group = threadIdx.x % 8 * kVector;
  column += group;
  for (int j = 0; j < 4; ++j) {
    int64_t at = row + j * 16 + threadIdx.x / 8;
    if constexpr (kTabled) at = pass.table.rows[at];
    const int64_t element = at * pass.columns + column;
    const bool inside = at >= 0 && at < rows && column < pass.columns;
    float values[kVector] = {};
    if constexpr (kNf4) {
      const float code = kNf4DeviceCode[threadIdx.x % 16];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool there = inside && column + i < pass.columns;
        const uint32_t byte = there ? pass.nf4.packed[(element + i) / 2] : 0;
        const float scale = there ? nf4_scale(pass.nf4, (element + i) >> pass.nf4.log2_blocksize) : 0.0f;
        values[i] = fmul_rn(shuffle(code, (element + i) % 2 == 0 ? byte >> 4 : byte, 16), scale);
      }
    } else if (inside) {
      load_columns(static_cast<const T*>(pass.dense) + at * pass.columns, column, pass.columns, false, values);
      if (pass.dropout.seed != nullptr) {
        const uint32_t kept = kept_elements(philox, element + drawn * pass.columns, false);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = (kept >> i) & 1u ? values[i] : 0.0f;
      }
    }
    save_stage<T>(to + j * 16 * kRankRow<T>, values);
  }
}

// Codes and scales of an NF4 tile. Codes and scales are loaded during the products of the previous tile, because
// loading scales is a chain of up to three loads. The decoded values are then stored into a stage.
struct RankCodes {
  uint32_t codes[4];
  float scales[4];
};

__device__ __forceinline__ void rank_load(const RankPass& pass, RankCodes& ahead, int64_t row, int64_t column) {
  column += threadIdx.x % 8 * kVector;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t at = row + j * 16 + threadIdx.x / 8, element = at * pass.columns + column;
    const bool inside = at < pass.rows && column < pass.columns;
    ahead.codes[j] = inside ? load_streaming(reinterpret_cast<const uint32_t*>(pass.nf4.packed + element / 2)) : 0;
    ahead.scales[j] = inside ? nf4_scale(pass.nf4, element >> pass.nf4.log2_blocksize) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void rank_decode(const RankCodes& ahead, SharedAt to) {
  const float code = kNf4DeviceCode[threadIdx.x % 16];  // each lane holds one of the 16 NF4 values
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      values[i] = fmul_rn(shuffle(code, ahead.codes[j] >> (4 * (i ^ 1)), 16), ahead.scales[j]);
    save_stage<T>(to + j * 16 * kRankRow<T>, values);
  }
}

// Applies dropout to the elements in the stage that this thread copied, with the Philox blocks `drawn`, `drawn` +
// `step`, … Returns the bits of the mask if kKept, otherwise 0.
template <typename T, bool kKept>
__device__ __forceinline__ uint32_t rank_drop(const Philox& philox, SharedAt at, uint64_t drawn, uint32_t step) {
  uint32_t kept = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const SharedAt group = at + j * 16 * kRankRow<T>;
    const uint4 words = kept_of_words(philox, drawn + j * step), value = load_shared_16(group);
    if constexpr (sizeof(T) == 4) {
      const uint4 upper = load_shared_16(group + 16);
      store_shared_16(group, make_uint4(value.x & spread_sign<false>(words.x), value.y & spread_sign<true>(words.x),
                                        value.z & spread_sign<false>(words.y), value.w & spread_sign<true>(words.y)));
      store_shared_16(group + 16,
                      make_uint4(upper.x & spread_sign<false>(words.z), upper.y & spread_sign<true>(words.z),
                                 upper.z & spread_sign<false>(words.w), upper.w & spread_sign<true>(words.w)));
    } else {
      store_shared_16(group, make_uint4(value.x & spread_signs(words.x), value.y & spread_signs(words.y),
                                        value.z & spread_signs(words.z), value.w & spread_signs(words.w)));
    }
    if constexpr (kKept) {
      kept |= words.x >> (4 * j) & kKeptBits >> (4 * j);
      kept |= words.y >> (4 * j + 1) & kKeptBits >> (4 * j + 1);
      kept |= words.z >> (4 * j + 2) & kKeptBits >> (4 * j + 2);
      kept |= words.w >> (4 * j + 3) & kKeptBits >> (4 * j + 3);
    }
  }
  return kept;
}

}  // namespace peft_ext
