// Declares the arguments of a rank pass and the layout of a stage, and defines those loads of tiles of the large matrix
// D into shared memory that do not use cp.async. rank_pass.cuh describes the whole pass and the names D, E, F, L, P and
// Q.
#pragma once

#include "linear/cuda/row_runs.cuh"
#include "linear/cuda/terms.cuh"
#include "nf4/cuda/nf4.cuh"

namespace peft_ext {

constexpr int kRankTile = kTileRows;  // number of rows, and of columns, in a tile of the large matrix D
constexpr int kRankThreads = 128;

// The results of a rank pass: P = D F (kRows), Q = Dᵀ L (kColumns), or both (kBoth). kRowsAndSquares computes P and the
// sum of the squares of each row of D. kBothAndDots computes P, Q and the sum of each column of D ∘ E (the dots).
// kGroupedRows computes P for the rows of a RowTable (a mixed batch), in which each tile has the factor F of its
// adapter. kRunRows computes P for the rows of each expert (row_runs.cuh), with the factor F of the expert. kRunColumns
// computes Q for the rows of each expert.
enum class RankWork { kRows, kRowsAndSquares, kColumns, kBoth, kBothAndDots, kGroupedRows, kRunRows, kRunColumns };

// Dropout of a rank pass. kDrawn draws the mask, and kKept also stores the bits of the mask for a later pass. kNone
// applies no dropout, except that if kWhole is false, rank_copy_any applies the dropout of the pass.
enum class RankMask { kNone, kDrawn, kKept };

// Number of stages of a rank pass. A stage is shared memory for one tile of D. The limit of 48 KiB of static shared
// memory allows only two float32 tiles. An NF4 weight needs only two stages, because the codes of the next tile are
// loaded into registers.
template <typename T, bool kNf4>
constexpr int kRankStages = sizeof(T) == 4 || kNf4 ? 2 : 4;

template <typename T>
constexpr int kRankRow = sizeof(T) == 4 ? 72 * 4 : 64 * 2;  // number of bytes from one row of a stage to the next row

struct RankPass {
  const void* dense = nullptr;  // the large matrix D, contiguous; null for an NF4 weight
  Nf4View nf4{};                // D as an NF4 weight, if `dense` is null; the decoded values are rounded to T
  int64_t rows = 0, columns = 0;
  const void* beside = nullptr;  // the matrix E, in the layout of D, for the sums of D ∘ E
  DeviceDropout dropout;
  Terms right;                // bfloat16 terms of F: outer = ranks, inner = columns of D, both padded
  Terms left;                 // bfloat16 terms of L: outer = ranks, inner = rows of D, both padded
  int64_t row_tiles = 1;      // number of tiles of rows of D per thread block
  int64_t column_tiles = 1;   // number of tiles of columns of D per thread block
  int64_t column_chunks = 1;  // number of thread blocks among which a row of tiles is divided
  int64_t padded_rank = 0;    // padded rank, which is the row length of the partial sums of P and Q
  // First rank that this launch computes. There are several launches if the padded rank is more than a launch computes,
  // which is 64 or 128 ranks (rank_pass_launch.cuh).
  int64_t first_rank = 0;
  float* row_sums = nullptr;     // partial sums of P = D F, [column chunks][padded rows][padded_rank]
  float* squares = nullptr;      // partial sums of the squares of D's rows, [column chunks][padded rows]
  float* column_sums = nullptr;  // partial sums of Q = Dᵀ L, [row chunks][padded columns][padded_rank]
  float* dots = nullptr;         // partial sums of D ∘ E, [row chunks][padded columns]
  int64_t padded_rows = 0, padded_columns = 0;
  uint32_t* kept = nullptr;      // bits of the dropout mask: [row tiles][column tiles][kRankThreads], see kKeptBits
  RowTable table;                // for kGroupedRows: the table of the mixed batch's rows
  int64_t right_stride = 0;      // distance from one adapter's or expert's F to the next F, in units of 16 bytes
  const RowRun* runs = nullptr;  // for kRunRows: one run per tile; for kRunColumns: one run per chunk of column_sums
};

// kKeptBits selects bits 15 and 31 of a word of a stored dropout mask, whose layout is the layout in which the threads
// of a rank pass draw the bits. Thread i of a tile has one word, for the rows 16 j + i / 8 with j < 4, and for the 8
// columns from column 8 · (i % 8) on. After a shift of the word to the left by 4 j + w, bits 15 and 31 say whether
// dropout keeps the thread's elements 2 w and 2 w + 1 of the row with number j.
constexpr uint32_t kKeptBits = 0x80008000u;

// Shared memory in which a thread block adds its warps' sums of D ∘ E; empty if kDots is false.
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

// Returns the offset in bytes of the group `group` of eight adjacent elements of row `row` in a stage.
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

// Copies the tile of D that begins at (row, column) element by element, for any shape and alignment, and applies
// dropout to the tile. Rows of D from `rows` on are filled with zeros. For the random draws of dropout, row i of D
// counts as row i + `drawn`. If kTabled is true, `row` is a row of the RowTable, not of D.
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
      if (pass.dropout.active) {
        const uint32_t kept = kept_elements(philox, element + drawn * pass.columns, false);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = (kept >> i) & 1u ? values[i] : 0.0f;
      }
    }
    save_stage<T>(to + j * 16 * kRankRow<T>, values);
  }
}

// Codes and scales of a thread's elements of one tile of an NF4 weight D. The codes and scales are loaded during the
// products of the previous tile, because loading a scale takes up to three loads, one after the other.
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

// Applies dropout to the elements in the stage that this thread copied. The random words for row j of the thread's four
// rows are the Philox block `drawn` + j · `step`. Returns the bits of the mask if kKept is true, and otherwise 0.
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
