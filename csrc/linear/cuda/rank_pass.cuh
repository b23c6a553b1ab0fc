// The products of a large matrix D [T, C] with small ones of R columns, in one pass over D:
//
//   rows:     P [T, R] = D F,   F [C, R]     (S = x̃ Aᵀ;  P = dY (ρB);  W Aᵀ, with the rows' sums of squares)
//   columns:  Q [C, R] = Dᵀ L,  L [T, R]     (dB = dYᵀ S;  dA = x̃ᵀ P)
//
// D is dense, float32, bfloat16 or float16, x̃ = dropout(x) made on the way, or it is an NF4 weight, decoded on the way.
// F and L come in bfloat16 terms (linear/cuda/terms.cuh), so sums have float32 precision whatever their type.
//
// A block of 4 warps owns kTokenTiles (or, for columns alone, any number of) tiles of 64 rows, and some tiles of 64
// columns; warp w owns rows 16 w … of a tile for P, columns 16 w … for Q. Tiles of D pass through kStages of shared
// memory: cp.async fills one while another is used, and the thread that copied eight elements drops them in place.
// Fragments come by ldmatrix, transposed for Q; those of F and L, which all blocks read, from L1 and L2.
// Shared: kStages x [64][72] elements; rows are 16 bytes longer than 64 elements need, which spreads them over banks.
// Sums: float32, a fresh one per tile and then added, since a tensor core's own sum rounds toward zero. Blocks write
// partial sums, [chunks][padded rows][padded rank]; a second kernel adds them in order. No atomics.
// Bytes moved: D once, plus the partial sums twice.
#pragma once

#include "linear/cuda/terms.cuh"
#include "nf4/cuda/nf4.cuh"

namespace peft_ext {

constexpr int kRankTile = 64;  // of D, both ways
constexpr int kRankThreads = 128;
constexpr int kRankStride = kRankTile + 8;

// How many tiles are there or on their way: 48 KiB hold no more of float32, and NF4's wait in registers.
template <typename T, bool kNf4>
constexpr int kRankStages = sizeof(T) == 4 || kNf4 ? 2 : 4;

struct RankPass {
  const void* dense = nullptr;  // D, contiguous, or
  Nf4View nf4{};                // D as an NF4 weight, rounded to T
  int64_t rows = 0, columns = 0;
  bool whole = false;  // columns is a multiple of 8 and D lies on 16 bytes (NF4: on 4)
  DeviceDropout dropout;
  Terms right;                   // F: outer = rank, inner = columns, padded to tiles
  Terms left;                    // L: outer = rank, inner = rows, padded to tiles
  int64_t row_tiles = 1;         // of a block
  int64_t column_tiles = 1;      // of a block
  int64_t padded_rank = 0;       // of the partial sums
  int64_t first_rank = 0;        // of those that this launch makes
  float* row_sums = nullptr;     // [column chunks][padded rows][padded_rank]
  float* squares = nullptr;      // [column chunks][padded rows]; null: not wanted
  float* column_sums = nullptr;  // [row chunks][padded columns][padded_rank]
  int64_t padded_rows = 0, padded_columns = 0;
};

template <typename T>
using RankStage = T[kRankTile * kRankStride];

template <typename T, bool kNf4>
struct RankStages {
  RankStage<T> tile[kRankStages<T, kNf4>];
};

// The stage's tile of D at (row, column) is on its way to, or in, shared memory. A thread makes four groups of eight
// elements, row j * 16 + thread / 8, columns thread % 8 * 8.
template <typename T, bool kNf4>
__device__ __forceinline__ void rank_issue(const RankPass& pass, const Philox& philox, T* stage, int64_t row,
                                           int64_t column) {
  const int group = threadIdx.x % 8 * kVector;
  column += group;
  for (int j = 0; j < 4; ++j) {
    const int tile_row = j * 16 + threadIdx.x / 8;
    const int64_t at = row + tile_row;
    T* to = stage + tile_row * kRankStride + group;
    const bool inside = at < pass.rows && column < pass.columns;
    if constexpr (kNf4) {  // not whole: one element at a time
      const float code = kNf4DeviceCode[threadIdx.x % 16];
      const int64_t element = at * pass.columns + column;
      float values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool there = inside && column + i < pass.columns;
        const uint32_t byte = there ? pass.nf4.packed[(element + i) / 2] : 0;
        const float scale = there ? nf4_scale(pass.nf4, (element + i) >> pass.nf4.log2_blocksize) : 0.0f;
        values[i] = fmul_rn(shuffle(code, (element + i) % 2 == 0 ? byte >> 4 : byte, 16), scale);
      }
      save_vector(to, values);
    } else {
      const T* from = static_cast<const T*>(pass.dense) + (inside ? at * pass.columns + column : 0);
      if (pass.whole) {
        cp_async_16(to, from, inside);
        if constexpr (sizeof(T) == 4) cp_async_16(to + 4, from + 4, inside);
      } else {
        float values[kVector] = {};
        if (inside) {
          load_columns(from - column, column, pass.columns, false, values);
          if (pass.dropout.seed != nullptr) {
            const uint32_t kept = kept_elements(philox, at * pass.columns + column, false);
#pragma unroll
            for (int i = 0; i < kVector; ++i) values[i] = (kept >> i) & 1u ? values[i] : 0.0f;
          }
        }
        save_vector(to, values);
      }
    }
  }
}

// An NF4 tile's codes and scales, loaded while the tile before it is multiplied, and put into a stage decoded: its
// scales are a chain of up to three loads.
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
__device__ __forceinline__ void rank_decode(const RankCodes& ahead, T* stage) {
  const float code = kNf4DeviceCode[threadIdx.x % 16];  // a lane's share of the table
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      values[i] = fmul_rn(shuffle(code, ahead.codes[j] >> (4 * (i ^ 1)), 16), ahead.scales[j]);
    save_vector(stage + (j * 16 + threadIdx.x / 8) * kRankStride + threadIdx.x % 8 * kVector, values);
  }
}

// Drops, in the stage, what this thread copied.
template <typename T>
__device__ __forceinline__ void rank_drop(const RankPass& pass, const Philox& philox, T* stage, int64_t row,
                                          int64_t column) {
  const int group = threadIdx.x % 8 * kVector;
  column += group;
  for (int j = 0; j < 4; ++j) {
    const int tile_row = j * 16 + threadIdx.x / 8;
    const int64_t at = row + tile_row;
    if (at >= pass.rows || column >= pass.columns) continue;
    const uint64_t drawn = static_cast<uint64_t>(at * pass.columns + column) / kPhiloxGroup;
    uint4* words = reinterpret_cast<uint4*>(stage + tile_row * kRankStride + group);
    if constexpr (sizeof(T) == 4) {
      const uint32_t kept = kept_of_group(philox, drawn);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 value = words[half];
        const auto mask = [&](int i) { return 0u - ((kept >> (4 * half + i)) & 1u); };
        words[half] = make_uint4(value.x & mask(0), value.y & mask(1), value.z & mask(2), value.w & mask(3));
      }
    } else {
      const uint4 value = *words, mask = kept_pairs(philox, drawn);
      *words = make_uint4(value.x & mask.x, value.y & mask.y, value.z & mask.z, value.w & mask.w);
    }
  }
}

// A operand, 16 x 16 at (row, column) of the stage, in terms; kTransposed: of the stage's transpose. `squared`: the
// squares of rows g and g + 8 are added to.
template <typename T, bool kTransposed>
__device__ __forceinline__ void rank_fragment(const T* stage, int row, int column, uint32_t (&a)[kTermsOf<T>][4],
                                              bool squared, float (&squares)[2]) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 4) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = g + 8 * (i % 2), k = 2 * t + 8 * (i / 2);
      const int first = kTransposed ? (row + k) * kRankStride + column + m : (row + m) * kRankStride + column + k;
      const float low = stage[first], high = stage[first + (kTransposed ? kRankStride : 1)];
      if (squared) squares[i % 2] += low * low + high * high;
      uint32_t terms[kTermsOf<T>];
      split_pair<kTermsOf<T>>(low, high, terms);
#pragma unroll
      for (int term = 0; term < kTermsOf<T>; ++term) a[term][i] = terms[term];
    }
  } else {
    // Matrix lane / 8 of the four: rows first, or transposed, columns first.
    const int matrix = lane / 8, in_matrix = lane % 8;
    uint32_t loaded[4];
    if (kTransposed) {
      ldmatrix_x4_trans(loaded, stage + (row + matrix / 2 * 8 + in_matrix) * kRankStride + column + matrix % 2 * 8);
    } else {
      ldmatrix_x4(loaded, stage + (row + matrix % 2 * 8 + in_matrix) * kRankStride + column + matrix / 2 * 8);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(loaded[i]);
      if (squared) squares[i % 2] += pair.x * pair.x + pair.y * pair.y;
      if constexpr (kTermsOf<T> == 1) {
        a[0][i] = loaded[i];
      } else {
        uint32_t terms[kTermsOf<T>];
        split_pair<kTermsOf<T>>(pair.x, pair.y, terms);
#pragma unroll
        for (int term = 0; term < kTermsOf<T>; ++term) a[term][i] = terms[term];
      }
    }
  }
}

// sums += a 16 x 64 (kTransposed: 64 x 16) strip of the stage times a strip of F (L) from `inner` on.
// kBoth: the kernel makes P and Q, whose sums leave fewer registers.
template <typename T, bool kTransposed, int kRanks, bool kBoth>
__device__ __forceinline__ void rank_product(const T* stage, const Terms& right, int64_t inner, int64_t first_rank,
                                             float (&sums)[kRanks][4], bool squared, float (&squares)[2]) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float fresh[kRanks][4] = {};
  // Registers hold only so much of F under way.
  [[maybe_unused]] constexpr int kUnrolled = kRanks == 8 || kBoth ? 1 : 2;
#pragma unroll kUnrolled
  for (int k = 0; k < kRankTile; k += 16) {
    uint32_t a[kTermsOf<T>][4];
    rank_fragment<T, kTransposed>(stage, kTransposed ? k : warp * 16, kTransposed ? warp * 16 : k, a, squared, squares);
    mma_terms<kRanks, kTermsOf<T>, kRanks == 2 ? kMaxTerms : 1>(fresh, a, right, {first_rank / 8, 1, lane, 0},
                                                                (inner + k) / 16);
  }
#pragma unroll
  for (int n = 0; n < kRanks; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] += fresh[n][i];
}

// One warp's 16 rows of partial sums.
template <int kRanks>
__device__ __forceinline__ void rank_store(float* to, int64_t padded_rank, float (&sums)[kRanks][4]) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kRanks; ++n) {
    float* at = to + g * padded_rank + n * 8 + 2 * t;
    *reinterpret_cast<float2*>(at) = make_float2(sums[n][0], sums[n][1]);
    *reinterpret_cast<float2*>(at + 8 * padded_rank) = make_float2(sums[n][2], sums[n][3]);
  }
}

// Blocks that a multiprocessor must hold: what the compiler may take registers for. Sums of both kinds take more.
template <bool kRows, bool kColumns>
constexpr int kRankBlocks = kRows && kColumns ? 3 : 4;

// kRanks: tiles of 8 ranks. kTokenTiles: row tiles of a block, 0 for any number (columns alone).
// Grid: x: chunks of row_tiles tiles of rows; y: chunks of column_tiles tiles of columns.
template <typename T, bool kNf4, int kRanks, int kTokenTiles, bool kRows, bool kColumns>
__global__ void __launch_bounds__(kRankThreads, (kRankBlocks<kRows, kColumns>)) rank_pass_kernel(RankPass pass) {
  static_assert(kTokenTiles > 0 ? kRows : !kRows && kColumns, "P's sums are in registers");
  using Stages = RankStages<T, kNf4>;
  PEFT_EXT_SHARED(Stages, shared);
  constexpr int kStages = kRankStages<T, kNf4>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Philox philox = load_philox(pass.dropout);
  const bool drops = pass.dropout.seed != nullptr && pass.whole;

  const int64_t row_tile = blockIdx.x * pass.row_tiles, column_tile = blockIdx.y * pass.column_tiles;
  const int64_t row_tiles =
      kTokenTiles > 0 ? kTokenTiles : min_of(pass.row_tiles, pass.padded_rows / kRankTile - row_tile);
  const int64_t column_tiles = min_of(pass.column_tiles, pass.padded_columns / kRankTile - column_tile);
  const int64_t steps = row_tiles * column_tiles;
  // Without P a block has one tile of columns: nothing is divided by what the compiler does not know.
  constexpr int kAround = kTokenTiles > 0 ? kTokenTiles : 1;
  const auto row_of = [&](int64_t step) { return (row_tile + (kTokenTiles > 0 ? step % kAround : step)) * kRankTile; };
  const auto column_of = [&](int64_t step) {
    return (column_tile + (kTokenTiles > 0 ? step / kAround : 0)) * kRankTile;
  };
  RankCodes ahead;
  if (kNf4 && pass.whole) rank_load(pass, ahead, row_of(0), column_of(0));
  const auto issue = [&](int64_t step) {
    if (step < steps) {
      T* stage = shared.tile[step % kStages];
      if (kNf4 && pass.whole) {
        rank_decode(ahead, stage);
        rank_load(pass, ahead, row_of(step + 1), column_of(step + 1));
      } else {
        rank_issue<T, kNf4>(pass, philox, stage, row_of(step), column_of(step));
      }
    }
    cp_async_commit();  // an empty group as well, so that waiting counts the same at the end
  };

  float row_sums[kAround][kRanks][4] = {};
  float row_squares[kAround][2] = {};
  float column_sums[kRanks][4] = {};
  float unused[2] = {};
  for (int step = 0; step < kStages - 1; ++step) issue(step);

  int64_t step = 0;
  for (int64_t c = 0; c < column_tiles; ++c) {
    for (int64_t r = 0; r < row_tiles; r += kAround) {
#pragma unroll
      for (int held = 0; held < kAround; ++held, ++step) {
        T* stage = shared.tile[step % kStages];
        cp_async_wait<kStages - 2>();
        if (drops) rank_drop<T>(pass, philox, stage, row_of(step), column_of(step));
        sync_threads();  // the stage is there for all, and nobody reads the one before it any more
        issue(step + kStages - 1);
        if (row_of(step) >= pass.padded_rows) continue;  // the last block's tiles may be fewer
        if constexpr (kRows)
          rank_product<T, false, kRanks, kColumns>(stage, pass.right, column_of(step), pass.first_rank, row_sums[held],
                                                   pass.squares != nullptr, row_squares[held]);
        if constexpr (kColumns)
          rank_product<T, true, kRanks, kRows>(stage, pass.left, row_of(step), pass.first_rank, column_sums, false,
                                               unused);
      }
    }
    if constexpr (kColumns) {
      const int64_t column = (column_tile + c) * kRankTile + warp * 16;
      rank_store<kRanks>(
          pass.column_sums + (blockIdx.x * pass.padded_columns + column) * pass.padded_rank + pass.first_rank,
          pass.padded_rank, column_sums);
#pragma unroll
      for (int n = 0; n < kRanks; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) column_sums[n][i] = 0.0f;
    }
  }
  if constexpr (kRows) {
#pragma unroll
    for (int held = 0; held < kAround; ++held) {
      const int64_t row = (row_tile + held) * kRankTile + warp * 16;
      if (row >= pass.padded_rows) break;
      rank_store<kRanks>(pass.row_sums + (blockIdx.y * pass.padded_rows + row) * pass.padded_rank + pass.first_rank,
                         pass.padded_rank, row_sums[held]);
      if (pass.squares != nullptr) {
        // The four lanes of a row add theirs.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float sum = row_squares[held][i];
          sum += shuffle_xor(sum, 1);
          sum += shuffle_xor(sum, 2);
          if (lane % 4 == 0) pass.squares[blockIdx.y * pass.padded_rows + row + lane / 4 + 8 * i] = sum;
        }
      }
    }
  }
}

}  // namespace peft_ext
