// The products of a large matrix D [T, C] with small ones of R columns, in one pass over D:
//
//   rows:     P [T, R] = D F,   F [C, R]     (S = x̃ Aᵀ;  P = dY (ρB);  W Aᵀ, with the rows' sums of squares)
//   columns:  Q [C, R] = Dᵀ L,  L [T, R]     (dB = dYᵀ S;  dA = x̃ᵀ P)
//
// D is dense, float32, bfloat16 or float16, x̃ = dropout(x) made on the way, or it is an NF4 weight, decoded on the way.
// F and L come in bfloat16 terms (linear/terms.cuh), so sums have float32 precision whatever their type.
//
// A block of 4 warps owns kTokenTiles (or, for columns alone, any number of) tiles of 64 rows, and some tiles of 64
// columns; warp w owns rows 16 w … of a tile for P, columns 16 w … for Q. Tiles of D pass through kStages of shared
// memory: cp.async fills one while another is used, and the thread that copied eight elements drops them in place.
// Fragments come by ldmatrix, transposed for Q; those of F and L from L1, as all blocks read the same few.
// Shared: kStages x [64][72] elements; rows are 16 bytes longer than 64 elements need, which spreads them over banks.
// Sums: float32, a fresh one per tile and then added, since a tensor core's own sum rounds toward zero. Blocks write
// partial sums, [chunks][padded rows][padded rank]; a second kernel adds them in order. No atomics.
// Bytes moved: D once, plus the partial sums twice.
#pragma once

#include "linear/terms.cuh"
#include "nf4/nf4.cuh"

namespace peft_ext {

constexpr int kRankTile = 64;  // of D, both ways
constexpr int kRankThreads = 128;
constexpr int kRankStride = kRankTile + 8;

// How many tiles are on their way: 48 KiB hold no more of float32.
template <typename T>
constexpr int kRankStages = sizeof(T) == 4 ? 2 : 4;

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

template <typename T>
struct RankStages {
  RankStage<T> tile[kRankStages<T>];
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
    if constexpr (kNf4) {
      const float code = kNf4DeviceCode[threadIdx.x % 16];  // a lane's share of the table
      const int64_t element = at * pass.columns + column;
      float values[kVector];
      if (pass.whole) {
        const uint32_t codes =
            inside ? load_streaming(reinterpret_cast<const uint32_t*>(pass.nf4.packed + element / 2)) : 0;
        const float scale = inside ? nf4_scale(pass.nf4, element >> pass.nf4.log2_blocksize) : 0.0f;
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = fmul_rn(shuffle(code, codes >> (4 * (i ^ 1)), 16), scale);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const bool there = inside && column + i < pass.columns;
          const uint32_t byte = there ? pass.nf4.packed[(element + i) / 2] : 0;
          const float scale = there ? nf4_scale(pass.nf4, (element + i) >> pass.nf4.log2_blocksize) : 0.0f;
          values[i] = fmul_rn(shuffle(code, (element + i) % 2 == 0 ? byte >> 4 : byte, 16), scale);
        }
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
  cp_async_commit();
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
template <typename T, bool kTransposed, int kRanks>
__device__ __forceinline__ void rank_product(const T* stage, const Terms& right, int64_t inner, int64_t first_rank,
                                             float (&sums)[kRanks][4], bool squared, float (&squares)[2]) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  float fresh[kRanks][4] = {};
  // Registers hold only so much of F under way.
  constexpr int kUnrolled = kRanks == 8 ? 1 : kRanks == 2 && kTermsOf<T> == 1 ? 4 : 2;
#pragma unroll kUnrolled
  for (int k = 0; k < kRankTile; k += 16) {
    uint32_t a[kTermsOf<T>][4];
    rank_fragment<T, kTransposed>(stage, kTransposed ? k : warp * 16, kTransposed ? warp * 16 : k, a, squared, squares);
    mma_terms<kRanks, kTermsOf<T>, kRanks == 2 ? kMaxTerms : 1>(fresh, a, right, first_rank + g, 8, inner + k + 2 * t);
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
  PEFT_EXT_SHARED(RankStages<T>, shared);
  constexpr int kStages = kRankStages<T>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Philox philox = load_philox(pass.dropout);
  const bool drops = pass.dropout.seed != nullptr && pass.whole;

  const int64_t row_tile = blockIdx.x * pass.row_tiles, column_tile = blockIdx.y * pass.column_tiles;
  const int64_t row_tiles =
      kTokenTiles > 0 ? kTokenTiles : min_of(pass.row_tiles, pass.padded_rows / kRankTile - row_tile);
  const int64_t column_tiles = min_of(pass.column_tiles, pass.padded_columns / kRankTile - column_tile);
  const int64_t steps = row_tiles * column_tiles;
  const auto row_of = [&](int64_t step) { return (row_tile + step % row_tiles) * kRankTile; };
  const auto column_of = [&](int64_t step) { return (column_tile + step / row_tiles) * kRankTile; };
  const auto issue = [&](int64_t step) {
    if (step < steps) {
      rank_issue<T, kNf4>(pass, philox, shared.tile[step % kStages], row_of(step), column_of(step));
    } else {
      cp_async_commit();  // an empty group, so that waiting counts the same at the end
    }
  };

  constexpr int kHeldTiles = kTokenTiles > 0 ? kTokenTiles : 1;
  float row_sums[kHeldTiles][kRanks][4] = {};
  float row_squares[kHeldTiles][2] = {};
  float column_sums[kRanks][4] = {};
  float unused[2] = {};
  for (int step = 0; step < kStages - 1; ++step) issue(step);

  int64_t step = 0;
  for (int64_t c = 0; c < column_tiles; ++c) {
    for (int64_t r = 0; r < row_tiles; r += kHeldTiles) {
#pragma unroll
      for (int held = 0; held < kHeldTiles; ++held, ++step) {
        T* stage = shared.tile[step % kStages];
        cp_async_wait<kStages - 2>();
        if (drops) rank_drop<T>(pass, philox, stage, row_of(step), column_of(step));
        sync_threads();  // the stage is there for all, and nobody reads the one before it any more
        issue(step + kStages - 1);
        if (row_of(step) >= pass.padded_rows) continue;  // the last block's tiles may be fewer
        if constexpr (kRows)
          rank_product<T, false, kRanks>(stage, pass.right, column_of(step), pass.first_rank, row_sums[held],
                                         pass.squares != nullptr, row_squares[held]);
        if constexpr (kColumns)
          rank_product<T, true, kRanks>(stage, pass.left, row_of(step), pass.first_rank, column_sums, false, unused);
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
    for (int held = 0; held < kHeldTiles; ++held) {
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

// What becomes of partial sums: value[row][r] = scale · row_scale[row] · Σ_chunks partial, and times rank_scale[r]
// where that is said. Each output may be null.
struct RankReduce {
  const float* partial;
  int64_t chunks, rows, padded_rows;
  int64_t rank, padded_rank;
  float scale;
  const float* row_scale;   // null: 1
  const float* rank_scale;  // null: 1
  float after;              // one more factor, with rank_scale
  float* plain;             // [rows][rank], without rank_scale
  uint16_t* terms;          // [3][padded rows][padded rank], with it
  uint16_t* transposed;     // [3][padded rank][padded rows], with it
  void* out;                // with it, of these type and strides
  DType type;
  int64_t row_stride, rank_stride;
};

// Of one pass: P's and Q's.
struct RankReduces {
  RankReduce work[2];
};

constexpr int kReduceThreads = 256;

// Grid: x: ceil(padded_rows · padded_rank / 2 / kReduceThreads) of the larger; y: which. A thread makes two
// neighbouring ranks.
__global__ void __launch_bounds__(kReduceThreads) rank_reduce_kernel(RankReduces reduces) {
  const RankReduce& work = reduces.work[blockIdx.y];
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int64_t pairs = work.padded_rank / 2, row = pair / pairs, r = pair % pairs * 2;
  if (row >= work.padded_rows) return;
  float2 sum = make_float2(0.0f, 0.0f);
  if (row < work.rows) {
    const float2* from = reinterpret_cast<const float2*>(work.partial) + pair;
    for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
      const float2 part = from[chunk * work.padded_rows * pairs];
      sum.x += part.x;
      sum.y += part.y;
    }
    const float scale = work.scale * (work.row_scale == nullptr ? 1.0f : work.row_scale[row]);
    sum.x *= scale;
    sum.y *= scale;
  }
  float values[2] = {sum.x, sum.y};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const bool there = row < work.rows && r + e < work.rank;
    if (there && work.plain != nullptr) work.plain[row * work.rank + r + e] = values[e];
    values[e] = there ? values[e] * work.after * (work.rank_scale == nullptr ? 1.0f : work.rank_scale[r + e]) : 0.0f;
    if (there && work.out != nullptr)
      store_value(work.out, work.type, row * work.row_stride + (r + e) * work.rank_stride, values[e]);
  }
  if (work.terms == nullptr && work.transposed == nullptr) return;
  uint32_t terms[kMaxTerms];
  split_pair<kMaxTerms>(values[0], values[1], terms);
#pragma unroll
  for (int term = 0; term < kMaxTerms; ++term) {
    if (work.terms != nullptr)
      reinterpret_cast<uint32_t*>(work.terms)[(term * work.padded_rows + row) * pairs + r / 2] = terms[term];
    if (work.transposed != nullptr) {
      uint16_t* to = work.transposed + (term * work.padded_rank + r) * work.padded_rows + row;
      to[0] = static_cast<uint16_t>(terms[term]);
      to[work.padded_rows] = static_cast<uint16_t>(terms[term] >> 16);
    }
  }
}

}  // namespace peft_ext
