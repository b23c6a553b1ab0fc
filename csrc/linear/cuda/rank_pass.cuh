// Computes products of a large matrix D [T, C] with small matrices of R columns, in one pass over D:
//
//   rows:     P [T, R] = D F,   F [C, R]     (S = x̃ Aᵀ;  P = dY (ρB);  W Aᵀ, with the sum of squares of each row).
//   columns:  Q [C, R] = Dᵀ L,  L [T, R]     (dB = dYᵀ S;  dA = x̃ᵀ P).
//   dots:     q [C] = Σ_t D[t] ∘ E[t]        (dg, from dY and Z).
//   grouped:  P_i = D[rows_i] F_i, for tiles of 64 rows of a RowTable, each with its own factor (row_tiles.cuh).
//   runs:     P_e = D[rows_e] F_e or Q_e = D[rows_e]ᵀ L[rows_e], for the rows of each expert (row_runs.cuh).
//
// D is a dense matrix (float32, bfloat16 or float16), or x̃ = dropout(x), which the kernel computes from x, or an NF4
// weight, which the kernel decodes. F and L are given as bfloat16 terms (linear/cuda/terms.cuh), so that sums have
// float32 precision for every dtype.
//
// For P, a thread block of 4 warps computes one tile of 64 rows over column_tiles tiles of 64 columns of D; for P and Q
// together, a thread block computes kRankTilesOfBoth tiles of rows. For Q alone, a thread block computes one tile of
// columns over row_tiles tiles of rows. For up to 32 ranks, warp w computes the rows (for Q: the columns) from 16 w on
// of a tile; for more ranks, RankShare divides the rows and the ranks among the warps.
//
// Tiles of D are loaded into kRankStages stages of shared memory: while the thread block multiplies one stage, cp.async
// fills the other stages (for NF4 weights and for matrices for which kWhole is false, plain loads and stores fill the
// stages). The thread that copied eight elements also applies dropout to these elements in place. Fragments of a 16-bit
// D are loaded by ldmatrix, transposed for Q. Fragments of F and L, which many thread blocks read, are loaded from L1
// and L2. If a pass computes P and Q of a bfloat16 D with up to 16 ranks, a warp loads the fragments of F for a tile of
// columns once, for all kRankTilesOfBoth tiles of rows. In a pass for only P or only Q, a warp loads as many fragments
// of F or L as fit in registers before the warp waits for a tile of D. A stage holds a tile of D with 64 rows and 64
// columns. For a 16-bit dtype, the eight groups of eight columns of a row are stored in the order group ^ row % 8, so
// that ldmatrix has no bank conflicts. In a stage of float32, each row is padded to 72 elements.
//
// Sums are float32. The products of each tile (or half of a tile) are summed separately and then added to the thread
// block's sums, because a tensor core rounds its sums toward zero. Thread blocks write partial sums [chunks][padded
// rows][padded rank]; rank_reduce_kernel adds the partial sums of P and Q in order, and column_reduce_kernel adds those
// of q. rank_pass_kernel uses no atomics. Bytes moved by a launch: D once, E once if given, the partial sums once, and
// the bits of the dropout mask once if they are stored.
#pragma once

#include "linear/cuda/rank_copy.cuh"

namespace peft_ext {

// Divides the product of a tile of D with kRanks tiles of 8 ranks among the warps of a thread block. A warp computes at
// most four tiles of ranks (32 ranks). For more than 32 ranks, a warp computes one part of the ranks for more rows of
// the tile (for Q: more columns), and so uses each fragment of the factor F (for Q: of L) for more products.
template <int kRanks>
struct RankShare {
  static constexpr int kTiles = kRanks < 4 ? kRanks : 4;  // number of tiles of 8 ranks per warp
  static constexpr int kParts = kRanks / kTiles;          // number of parts of the ranks; a warp has one part
  static constexpr int kRuns = kParts;                    // number of groups of 16 rows (for Q: of 16 columns) per warp
  using Sums = float[kRuns][kTiles][4];

  static __device__ __forceinline__ int part() { return threadIdx.x / kWarpSize % kParts; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / kWarpSize / kParts * kRuns * 16; }
};

// The fragments of F or L that this warp holds in registers for one tile of D. A tile of D is multiplied in four steps
// of 16 columns (for Q: of 16 rows). For each term and each of the warp's tiles of 8 ranks, the registers hold the
// fragments of two steps, or of all four steps if kRoomy is true.
template <int kRanks, int kTerms, bool kRoomy>
struct RankFactor {
  static constexpr int kTiles = RankShare<kRanks>::kTiles;
  static constexpr int kBlocks = kRanks < 8 ? kRanks : 8;         // number of tiles of 8 ranks within 64 ranks
  static constexpr int kTile = kTerms * kBlocks * 2 * kWarpSize;  // size, in 16-byte units, of F or L for one tile of D
  static constexpr int kHeld = kRoomy ? 2 : 1;

  uint4 held[kHeld][kTerms][kTiles];

  // Returns the offset in F or L of this lane's part of the warp's ranks, in units of 16 bytes. `halves`: distance from
  // one group of 64 ranks to the next group, in units of 16 bytes.
  static __device__ __forceinline__ int64_t share(int64_t halves) {
    const int part = RankShare<kRanks>::part(), lane = threadIdx.x % kWarpSize;
    return part / 2 * halves + part % 2 * kTiles * 2 * kWarpSize + lane;
  }
  __device__ __forceinline__ void load(const uint4* tile, int two, int term) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      held[two % kHeld][term][n] = load_cached_in_order(tile + two * kWarpSize + (term * kBlocks + n) * 2 * kWarpSize);
  }
  __device__ __forceinline__ void start(const uint4* tile) {
#pragma unroll
    for (int two = 0; two < kHeld; ++two)
#pragma unroll
      for (int term = kTerms - 1; term >= 0; --term) load(tile, two, term);
  }
};

// Loads a 16 x 16 fragment of D, the A operand of mma.sync, as bfloat16 terms. The fragment has 16 of this warp's rows
// of the stage, from row 16 · `run` on, and 16 columns, from column 16 · `step` on. If kTransposed is true, the
// fragment is the transpose of 16 of this warp's columns and of the rows from 16 · `step` on. `at`: the stage's address
// plus ldmatrix_offset. If kSquares is true, the squares of this lane's elements in the rows g and g + 8 of the
// fragment, where g = lane / 4, are added to squares[0] and squares[1].
template <typename T, bool kTransposed, bool kSquares, int kRanks>
__device__ __forceinline__ void rank_fragment(const unsigned char* stage, SharedAt at, int run, int step,
                                              uint32_t (&a)[kTermsOf<T>][4], float (&squares)[2]) {
  if constexpr (sizeof(T) == 4) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    constexpr int kStride = kRankRow<T> / 4;
    const float* tile = reinterpret_cast<const float*>(stage);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = RankShare<kRanks>::first_row() + run * 16 + g + 8 * (i % 2), k = step * 16 + 2 * t + 8 * (i / 2);
      const int first = kTransposed ? k * kStride + m : m * kStride + k;
      const float low = tile[first], high = tile[first + (kTransposed ? kStride : 1)];
      if constexpr (kSquares) squares[i % 2] += low * low + high * high;
      uint32_t terms[kTermsOf<T>];
      split_pair<kTermsOf<T>>(low, high, terms);
#pragma unroll
      for (int term = 0; term < kTermsOf<T>; ++term) a[term][i] = terms[term];
    }
  } else {
    uint32_t loaded[4];
    if constexpr (kTransposed) {
      ldmatrix_x4_trans(loaded, (at ^ run * 32) + step * 16 * kRankRow<T>);
    } else {
      ldmatrix_x4(loaded, (at ^ step * 32) + run * 16 * kRankRow<T>);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kSquares || kTermsOf<T> > 1) {
        const float2 pair = unpack2<T>(loaded[i]);
        if constexpr (kSquares) squares[i % 2] += pair.x * pair.x + pair.y * pair.y;
        if constexpr (kTermsOf<T> > 1) {
          uint32_t terms[kTermsOf<T>];
          split_pair<kTermsOf<T>>(pair.x, pair.y, terms);
#pragma unroll
          for (int term = 0; term < kTermsOf<T>; ++term) a[term][i] = terms[term];
        }
      }
      if constexpr (kTermsOf<T> == 1) a[0][i] = loaded[i];
    }
  }
}

// Returns the offset of this lane's ldmatrix address in a stage. The A operand of mma.sync consists of four 8 x 8
// matrices: from one matrix to the next, the rows change first and then the columns, or, for the transpose, the columns
// change first and then the rows.
template <bool kTransposed, int kRanks>
__device__ __forceinline__ uint32_t ldmatrix_offset() {
  const int first = RankShare<kRanks>::first_row(), lane = threadIdx.x % kWarpSize;
  if (kTransposed) return (lane / 16 * 8 + lane % 8) * 128 + ((first / 8 + lane / 8 % 2) ^ lane % 8) * 16;
  return (first + lane % 16) * 128 + (lane / 16 ^ lane % 8) * 16;
}

// Adds the product of this warp's rows of the stage with F to `sums`, or, if kTransposed is true, the product of the
// transpose of this warp's columns with L. If kRoomy is true, `factor` holds the fragments of F or L for all four steps
// of a tile of D. Otherwise `factor` holds the fragments of two steps: as soon as a term of F or L is used, the term's
// registers are loaded for the next two steps, first of this tile and then of the tile at `next`.
template <typename T, bool kTransposed, bool kSquares, int kRanks, int kTerms, bool kRoomy>
__device__ __forceinline__ void rank_product(const unsigned char* stage, SharedAt at,
                                             RankFactor<kRanks, kTerms, kRoomy>& factor, const uint4* tile,
                                             const uint4* next, typename RankShare<kRanks>::Sums& sums,
                                             float (&squares)[RankShare<kRanks>::kRuns][2]) {
  using Share = RankShare<kRanks>;
  float fresh[Share::kTiles][4];
  const auto add = [&](int run) {
#pragma unroll
    for (int n = 0; n < Share::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[run][n][i] += fresh[n][i];
  };
  // If kRoomy is false, the loop is not unrolled, because the compiler would start all loads of an unrolled loop at
  // once and run out of registers.
  [[maybe_unused]] constexpr int kUnrolled = kRoomy ? 2 : 1;
#pragma unroll kUnrolled
  for (int two = 0; two < 2; ++two) {
#pragma unroll
    for (int run = 0; run < Share::kRuns; ++run) {
      if (Share::kRuns > 1 || two == 0) {
#pragma unroll
        for (int n = 0; n < Share::kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) fresh[n][i] = 0.0f;
      }
      uint32_t a[2][kTermsOf<T>][4];
#pragma unroll
      for (int step = 0; step < 2; ++step)
        rank_fragment<T, kTransposed, kSquares, kRanks>(stage, at, run, two * 2 + step, a[step], squares[run]);
#pragma unroll
      for (int term = kTerms - 1; term >= 0; --term) {
        uint32_t b[2][Share::kTiles][2];
#pragma unroll
        for (int n = 0; n < Share::kTiles; ++n) {
          const uint4 words = factor.held[two % factor.kHeld][term][n];
          b[0][n][0] = words.x, b[0][n][1] = words.y, b[1][n][0] = words.z, b[1][n][1] = words.w;
        }
#pragma unroll
        for (int step = 0; step < 2; ++step)
          mma_terms<Share::kTiles, kTermsOf<T>, kMaxTerms>(fresh, a[step], b[step], term);
        if (!kRoomy && run + 1 == Share::kRuns) {
          if (two == 0) {
            factor.load(tile, 1, term);
          } else if (next != nullptr) {
            factor.load(next, 0, term);
          }
        }
      }
      if (Share::kRuns > 1) add(run);
    }
  }
  if (Share::kRuns == 1) add(0);
}

// Stores a warp's sums of P or Q, which are the thread block's partial sums. `to`: address of the sum of the tile's
// first row and the launch's first rank.
template <int kRanks>
__device__ __forceinline__ void rank_store(float* to, int64_t padded_rank, typename RankShare<kRanks>::Sums& sums) {
  using Share = RankShare<kRanks>;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int run = 0; run < Share::kRuns; ++run)
#pragma unroll
    for (int n = 0; n < Share::kTiles; ++n) {
      const int rank = Share::part() * Share::kTiles * 8 + n * 8 + 2 * t;
      float* at = to + (Share::first_row() + run * 16 + g) * padded_rank + rank;
      *reinterpret_cast<float2*>(at) = make_float2(sums[run][n][0], sums[run][n][1]);
      *reinterpret_cast<float2*>(at + 8 * padded_rank) = make_float2(sums[run][n][2], sums[run][n][3]);
    }
}

// Adds to `dots` the products D ∘ E of the elements that this thread copied: eight columns and four rows of a tile.
template <typename T>
__device__ __forceinline__ void rank_dots(SharedAt copied, const uint4 (&beside)[4][sizeof(T) / 2],
                                          float (&dots)[kVector]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int half = 0; half < static_cast<int>(sizeof(T) / 2); ++half) {
      const uint4 a = load_shared_16(copied + (j * 16 * kRankRow<T> + half * 16)), b = beside[j][half];
      const uint32_t of_d[4] = {a.x, a.y, a.z, a.w}, of_e[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          dots[4 * half + i] += __uint_as_float(of_d[i]) * __uint_as_float(of_e[i]);
        } else {
          const float2 d = unpack2<T>(of_d[i]), e = unpack2<T>(of_e[i]);
          dots[2 * i] += d.x * e.x;
          dots[2 * i + 1] += d.y * e.y;
        }
      }
    }
}

// Number of tiles of rows per thread block in passes that compute P and Q. The sums of P for the tiles of a thread
// block stay in registers. The more tiles of rows a thread block has, the fewer partial sums of Q are written.
constexpr int kRankTilesOfBoth = 4;

// Number of thread blocks of rank_pass_kernel that must fit on a multiprocessor; the compiler limits the registers of a
// thread so that these blocks fit.
template <typename T, bool kNf4, RankWork kWork, bool kWhole, int kRanks>
constexpr int kRankBlocks = !kWhole || kRanks == 16 || kWork == RankWork::kBothAndDots ||
                                    (kWork == RankWork::kBoth && kRanks > 2) || (kNf4 && sizeof(T) == 4 && kRanks > 4)
                                ? 2
                            : kWork == RankWork::kBoth || kRanks > 4 || kNf4 || sizeof(T) == 4 ? 3
                                                                                               : 4;

// kWhole: whether the number of D's columns is a multiple of 8, offsets within the rows of a tile fit in 32 bits, and D
// is aligned to 16 bytes (an NF4 weight: to 4 bytes). kRanks: number of tiles of 8 ranks. kTerms: number of terms of F;
// L always has three terms. A chunk of rows is row_tiles tiles of rows, and a chunk of columns is column_tiles tiles
// of columns. Grid: if P is computed and there are no runs, x has a thread block for each chunk of columns of the first
// chunk of rows, then of the second chunk of rows, and so on. If only Q is computed, x has a thread block for each
// chunk of rows, and y for each tile of columns. If there are runs (row_runs.cuh), x has a thread block for each run,
// and y for each chunk of columns. In the first two grids, the thread blocks that read the same part of F (for Q alone:
// of L) are a fixed distance apart, the number of chunks of columns (for Q alone: of rows); see docs/kernels.md for
// when L1 holds this part.
template <typename T, bool kNf4, bool kWhole, int kRanks, int kTerms, RankWork kWork, RankMask kMask>
__global__ void __launch_bounds__(kRankThreads, (kRankBlocks<T, kNf4, kWork, kWhole, kRanks>))
    rank_pass_kernel(RankPass pass) {
  PEFT_EXT_KERNEL;
  constexpr bool kRuns = kWork == RankWork::kRunRows || kWork == RankWork::kRunColumns;
  constexpr bool kRows = kWork != RankWork::kColumns && kWork != RankWork::kRunColumns;
  constexpr bool kSquares = kWork == RankWork::kRowsAndSquares;
  constexpr bool kDots = kWork == RankWork::kBothAndDots, kBoth = kWork == RankWork::kBoth || kDots;
  constexpr bool kTabled = kWork == RankWork::kGroupedRows;
  constexpr int kAround = kBoth ? kRankTilesOfBoth : 1;
  constexpr int kStages = kRankStages<T, kNf4>, kStage = kRankTile * kRankRow<T>, kOnTheWay = kStages - 1;
  using Stages = RankStages<T, kNf4, kDots>;
  PEFT_EXT_SHARED(Stages, shared);
  [[maybe_unused]] const int lane = threadIdx.x % kWarpSize;
  const int copy_row = threadIdx.x / 8, copy_group = threadIdx.x % 8;
  [[maybe_unused]] RowRun run{};
  if constexpr (kRuns) {
    run = pass.runs[blockIdx.x];
    if (run.rows == 0 || run.expert < 0) return;
  }
  [[maybe_unused]] const Philox philox =
      kMask == RankMask::kNone && kWhole ? Philox{} : load_philox(pass.dropout, run.expert);
  const SharedAt base = shared_at(shared.tile), copy_at = base + rank_offset<T>(copy_row, copy_group);
  const SharedAt rows_at = base + ldmatrix_offset<false, kRanks>(), columns_at = base + ldmatrix_offset<true, kRanks>();

  constexpr bool kOneDimension = kRows && !kRuns;
  const uint32_t chunks = static_cast<uint32_t>(pass.column_chunks);
  const int64_t row_chunk = kOneDimension ? blockIdx.x / chunks : blockIdx.x;
  const int64_t column_chunk = kOneDimension ? blockIdx.x % chunks : blockIdx.y;
  const int64_t row_tile = kRuns ? run.tile : row_chunk * pass.row_tiles;
  const int64_t column_tile = column_chunk * pass.column_tiles;
  const int64_t row = kRuns ? run.first : row_tile * kRankTile, column = column_tile * kRankTile;
  // To compute P, or P and Q, a thread block reads one tile of columns after the other. To compute only Q, a thread
  // block reads one tile of rows after the other, in one tile of columns.
  const int tiles = static_cast<int>(kRows   ? min_of(pass.column_tiles, pass.padded_columns / kRankTile - column_tile)
                                     : kRuns ? (run.rows + kRankTile - 1) / kRankTile
                                             : min_of(pass.row_tiles, pass.padded_rows / kRankTile - row_tile));

  // If kWhole is true and D is dense: `from` is the address of this thread's part of the next tile, and rows_left and
  // columns_left are the sizes of the part of D that begins at `from`.
  const uint32_t row_bytes = static_cast<uint32_t>(pass.columns * sizeof(T));
  // Distance in bytes, in global memory, from a tile of D to the tile that the thread block reads in the next round of
  // the loop over `outer`: the next tile along the columns, or, for Q alone, along the rows.
  const uint32_t tile_bytes = kRows ? kRankTile * sizeof(T) : kRankTile * row_bytes;
  const int64_t first_row = kTabled ? 0 : row + copy_row;
  const unsigned char* from = static_cast<const unsigned char*>(pass.dense) +
                              (first_row * pass.columns + column + copy_group * kVector) * sizeof(T);
  // If kTabled is true: the offsets of this thread's four rows in D, in units of 16 bytes. An offset whose bits are all
  // ones stands for an unused row of the table.
  [[maybe_unused]] uint32_t tabled[4];
  if constexpr (kTabled && kWhole) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t named = pass.table.rows[row + copy_row + j * 16];
      tabled[j] = named < 0 ? ~0u : static_cast<uint32_t>(static_cast<int64_t>(named) * pass.columns * sizeof(T) / 16);
    }
  }
  [[maybe_unused]] const unsigned char* beside = nullptr;
  if constexpr (kDots)
    beside = static_cast<const unsigned char*>(pass.beside) + (from - static_cast<const unsigned char*>(pass.dense));
  int rows_left = (kRuns ? run.rows : static_cast<int>(min_of(pass.rows - row, 1 << 30))) - copy_row;
  int columns_left = static_cast<int>(min_of(pass.columns - column, 1 << 30)) - copy_group * kVector;
  const int64_t drawn_row = kRuns ? run.before : row;
  uint64_t drawn = static_cast<uint64_t>((drawn_row + copy_row) * pass.columns + column) / kPhiloxGroup + copy_group;
  const uint32_t drawn_step = static_cast<uint32_t>(pass.columns * 16 / kPhiloxGroup);
  const uint32_t drawn_tile = kRows ? kRankTile / kPhiloxGroup : 4 * drawn_step;
  uint32_t* kept = nullptr;
  const uint32_t kept_tile = static_cast<uint32_t>(pass.padded_columns / kRankTile * kRankThreads);
  // kRunColumns has no instance that draws a mask without storing its bits. For kRunColumns, pass.kept is null if the
  // bits are not wanted.
  [[maybe_unused]] const bool keeps =
      kMask == RankMask::kKept && (kWork != RankWork::kRunColumns || pass.kept != nullptr);
  if (keeps)
    kept = pass.kept + (row_tile * (pass.padded_columns / kRankTile) + column_tile) * kRankThreads + threadIdx.x;

  // `right` and `left` point to this lane's part of the first fragments of F and L.
  using Share = RankShare<kRanks>;
  constexpr bool kRoomy = kRanks == 2;  // for 16 ranks, more fragments of F or L fit in the registers
  using Right = RankFactor<kRanks, kTerms, kRoomy>;
  using Left = RankFactor<kRanks, kMaxTerms, kRoomy && !kBoth>;
  const int64_t right_halves = pass.padded_columns / kRankTile * Right::kTile;
  const int64_t left_halves = pass.padded_rows / kRankTile * Left::kTile;
  const uint4* right =
      pass.right.data + pass.first_rank / 64 * right_halves + column_tile * Right::kTile + Right::share(right_halves);
  if constexpr (kTabled) right += pass.table.tiles[row_chunk].factor * pass.right_stride;
  if constexpr (kRuns) right += run.expert * pass.right_stride;
  const uint4* left =
      pass.left.data + pass.first_rank / 64 * left_halves + row_tile * Left::kTile + Left::share(left_halves);

  RankCodes ahead;
  const auto row_of = [&](int outer, int held) { return row + (kRows ? held : outer) * kRankTile; };
  const auto column_of = [&](int outer) { return column + (kRows ? outer : 0) * kRankTile; };
  if constexpr (kNf4 && kWhole) rank_load(pass, ahead, row, column);

  // Starts to load a tile into a stage. The tile comes `further` tiles after the tile with the index `outer`. `held` is
  // the index, among the thread block's tiles of rows, of the tile of rows in which the tile lies.
  const auto issue = [&](int outer, int further, int held, uint32_t stage) {
    if (outer + further < tiles) {
      if constexpr (!kWhole) {
        rank_copy_any<T, kNf4, kTabled>(pass, philox, copy_at + stage, row_of(outer + further, held),
                                        column_of(outer + further), kRuns ? row + run.rows : pass.rows,
                                        kRuns ? run.before - row : 0);
      } else if constexpr (kNf4) {
        rank_decode<T>(ahead, copy_at + stage);
        rank_load(pass, ahead, row_of(outer + further + 1, 0), column_of(outer + further + 1));
      } else {
        const int down = rows_left - (kRows ? held : further) * kRankTile;
        const int along = columns_left - (kRows ? further : 0) * kRankTile;
        const uint32_t offset = further * tile_bytes + (kRows ? held : 0) * kRankTile * row_bytes;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const SharedAt to = copy_at + (stage + j * 16 * kRankRow<T>);
          const unsigned char* group = from + (offset + j * 16 * row_bytes);
          bool take = j * 16 < down && along > 0;
          if constexpr (kTabled) {
            group = from + (static_cast<uint64_t>(tabled[j]) * 16 + further * tile_bytes);
            take = tabled[j] != ~0u && along > 0;
          }
          cp_async_16(to, group, take);
          if constexpr (sizeof(T) == 4) cp_async_16(to + 16, group + 16, take);
        }
      }
    }
    // A group of cp.async is also committed without loads, so that every cp_async_wait counts equally many groups.
    cp_async_commit();
  };

  typename Share::Sums row_sums[kAround] = {}, column_sums = {};
  float squares[Share::kRuns][2] = {};
  [[maybe_unused]] float dots[kVector] = {};
#pragma unroll
  for (int step = 0; step < kOnTheWay; ++step) issue(0, step / kAround, step % kAround, step * kStage);

  [[maybe_unused]] Right right_factor;
  [[maybe_unused]] Left left_factor;
  if constexpr (!kRoomy && !kBoth) {
    if constexpr (kRows) right_factor.start(right);
    if constexpr (!kRows) left_factor.start(left);
  }
  uint32_t stage = 0;
  for (int outer = 0; outer < tiles; ++outer) {
    // In bfloat16, the fragments of F stay in registers for kAround tiles of rows. For float16 and float32 D, these
    // registers hold the terms of D's elements.
    constexpr bool kHeld = kRoomy && kBoth && kTermsOf<T> == 1;
    if constexpr (kHeld) right_factor.start(right);
#pragma unroll
    for (int held = 0; held < kAround; ++held) {
      if constexpr (kRoomy && kRows && !kHeld) right_factor.start(right);
      if constexpr (kRoomy && !kRows) left_factor.start(left);
      [[maybe_unused]] uint4 other[4][sizeof(T) / 2];
      if constexpr (kDots) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int half = 0; half < static_cast<int>(sizeof(T) / 2); ++half) {
            const bool take = j * 16 < rows_left - held * kRankTile && columns_left > 0;
            const uint32_t offset = (held * kRankTile + j * 16) * row_bytes + half * 16;
            other[j][half] =
                take ? load_streaming(reinterpret_cast<const uint4*>(beside + offset)) : make_uint4(0, 0, 0, 0);
          }
      }
      cp_async_wait<kOnTheWay - 1>();
      if constexpr (kDots) rank_dots<T>(copy_at + stage, other, dots);
      if constexpr (kWhole && kMask != RankMask::kNone) {
        const uint32_t bits = rank_drop<T, kMask == RankMask::kKept>(philox, copy_at + stage, drawn, drawn_step);
        if (keeps) *kept = bits;
      }
      sync_threads();  // after the barrier, the stage is full, and no thread reads the previous stage
      issue(outer, (held + kOnTheWay) / kAround, (held + kOnTheWay) % kAround,
            stage == 0 ? kOnTheWay * kStage : stage - kStage);
      const unsigned char* tile = &shared.tile[0][0] + stage;
      if constexpr (kBoth) {
        // The last thread block may have fewer than kRankTilesOfBoth tiles of rows.
        if (held == 0 || (row_tile + held) * kRankTile < pass.padded_rows) {
          const uint4* held_left = left + held * Left::kTile;
          if constexpr (!kRoomy) right_factor.start(right);
          rank_product<T, false, false, kRanks>(tile, rows_at + stage, right_factor, right, nullptr, row_sums[held],
                                                squares);
          left_factor.start(held_left);
          rank_product<T, true, false, kRanks>(tile, columns_at + stage, left_factor, held_left, nullptr, column_sums,
                                               squares);
        }
      } else if constexpr (kRows) {
        const uint4* next = outer + 1 < tiles ? right + Right::kTile : right;
        rank_product<T, false, kSquares, kRanks>(tile, rows_at + stage, right_factor, right, next, row_sums[0],
                                                 squares);
      } else {
        const uint4* next = outer + 1 < tiles ? left + Left::kTile : left;
        rank_product<T, true, false, kRanks>(tile, columns_at + stage, left_factor, left, next, column_sums, squares);
      }
      stage = stage == kOnTheWay * kStage ? 0 : stage + kStage;
    }
    from += tile_bytes;
    if constexpr (kDots) beside += tile_bytes;
    drawn += drawn_tile;
    if constexpr (kRows) {
      columns_left -= kRankTile;
      right += Right::kTile;
    } else {
      rows_left -= kRankTile;
      left += Left::kTile;
    }
    if (keeps) kept += kept_tile;
    if constexpr (kBoth) {
      const int64_t at = row_chunk * pass.padded_columns + column + outer * kRankTile;
      rank_store<kRanks>(pass.column_sums + at * pass.padded_rank + pass.first_rank, pass.padded_rank, column_sums);
#pragma unroll
      for (int run = 0; run < Share::kRuns; ++run)
#pragma unroll
        for (int n = 0; n < Share::kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) column_sums[run][n][i] = 0.0f;
    }
    if constexpr (kDots) {
      // In every warp, the four lanes whose numbers are equal modulo 8 hold sums `dots` of the same eight columns.
      // shared.sums may be written again after the next tile's barrier.
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        dots[i] += shuffle_xor(dots[i], 8);
        dots[i] += shuffle_xor(dots[i], 16);
        if (lane < 8) shared.sums[threadIdx.x / kWarpSize][lane * kVector + i] = dots[i];
        dots[i] = 0.0f;
      }
      sync_threads();
      if (threadIdx.x < kRankTile) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kRankThreads / kWarpSize; ++w) sum += shared.sums[w][threadIdx.x];
        pass.dots[row_chunk * pass.padded_columns + column + outer * kRankTile + threadIdx.x] = sum;
      }
    }
  }
  if constexpr (!kRows) {
    const int64_t at = row_chunk * pass.padded_columns + column;
    rank_store<kRanks>(pass.column_sums + at * pass.padded_rank + pass.first_rank, pass.padded_rank, column_sums);
  }
  if constexpr (kRows) {
#pragma unroll
    for (int held = 0; held < kAround; ++held) {
      const int64_t mine = (kRuns ? row_tile * kRankTile : row) + held * kRankTile;
      if (mine >= pass.padded_rows) break;
      const int64_t at = column_chunk * pass.padded_rows + mine;
      rank_store<kRanks>(pass.row_sums + at * pass.padded_rank + pass.first_rank, pass.padded_rank, row_sums[held]);
      if constexpr (kSquares) {
        // Adds the sums of squares of a row over the four lanes that hold parts of the row.
#pragma unroll
        for (int run = 0; run < Share::kRuns; ++run)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float sum = squares[run][i];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            const int64_t to = at + Share::first_row() + run * 16 + lane / 4 + 8 * i;
            if (lane % 4 == 0 && Share::part() == 0) pass.squares[to] = sum;
          }
      }
    }
  }
}

}  // namespace peft_ext
