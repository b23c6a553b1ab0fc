// Computes the rank passes of several layers of one input x in one pass over x:
//
//   rows:     S_i [T, R_i] = x̃_i A_iᵀ         columns:  dA_iᵀ [K, R_i] = x̃_iᵀ P_i         x̃_i = mask_i ∘ x
//
// P_i is the matrix P of layer i (see backward_cuda.cpp). A_i and P_iᵀ are given as bfloat16 terms (terms.cuh), as the
// factors F and L of rank_pass.cuh. x is bfloat16 or float16, and each group of eight columns of x is aligned to 16
// bytes.
//
// A thread block loads tiles of 64 x 64 elements of x, once for all layers. kSplit warps, one or two, compute the
// product of one layer. For up to 16 ranks, one warp computes all 64 rows (for dA: all 64 columns) of a tile, and so
// uses each fragment of the factor for four products. For 17 to 32 ranks, two warps each compute half of the rows (for
// dA: of the columns). A warp draws the mask of its own layer, 2,048 elements at a time, and writes the masked elements
// to 4 KiB of shared memory that no other warp uses, in the layout of a tile: 32 lines of 128 bytes, with the eight
// groups of a line in the order group ^ line % 8. ldmatrix reads the fragments of x̃_i from the warp's masked elements,
// or, if no layer has dropout, from the tile of x.
//
// Thread blocks that read the same chunk of the factors are `chunks` blocks apart in the grid. If the number of
// multiprocessors is a multiple of `chunks`, and the GPU gives consecutive thread blocks to the multiprocessors in
// turn, all thread blocks of a multiprocessor read the same chunk. Whether L1 holds the chunk depends on the chunk's
// size, which is 66 KiB for each layer if x is [8192, 4096], a layer has up to 16 ranks, and the factors have three
// terms (computed, see docs/kernels.md).
//
// The order of the sums is the same as in rank_pass.cuh, so that a layer's results have the same bits as the results of
// a pass for this layer alone. Bytes moved by a launch: x once, the mask's bits once if wanted, and the partial sums of
// each layer once.
#pragma once

#include "linear/cuda/rank_pass.cuh"

namespace peft_ext {

constexpr int kMostSiblingWarps = 6;
constexpr int kSiblingLines = 32;                   // number of lines of 128 bytes that hold a warp's masked elements
constexpr int kSiblingBytes = kSiblingLines * 128;  // number of bytes of a warp's masked elements
constexpr int kSiblingTile = kRankTile * 128;       // number of bytes in a tile of x

// Number of stages, which are shared memory for one tile of x each. If a layer has dropout, computing a tile takes so
// long that loading one tile ahead hides the latency of memory.
template <bool kDropped>
constexpr int kSiblingStages = kDropped ? 2 : 4;

struct SiblingPart {
  const uint4* factor = nullptr;  // bfloat16 terms of A_i [ranks][columns of x]; for dA, of P_iᵀ [ranks][rows of x]
  DeviceDropout dropout;          // not active if the layer has no dropout
  float* sums = nullptr;          // partial sums in the layout of RankPass's row_sums (for dA: of its column_sums)
  uint32_t* kept = nullptr;       // bits of the mask, as `kept` of RankPass, or null; only for dA
};

struct SiblingsPass {
  const void* dense = nullptr;  // x as a contiguous matrix
  int64_t rows = 0, columns = 0, padded_rows = 0, padded_columns = 0;
  int64_t tiles = 1;   // number of tiles of x per thread block, along x's columns (for dA: along x's rows)
  int64_t chunks = 1;  // number of thread blocks among which a row (for dA: a column) of tiles is divided
  SiblingPart parts[kMostSiblingWarps];
};

// Returns the Philox parameters of a layer's dropout. For a layer without dropout, the parameters keep every element.
__device__ __forceinline__ Philox sibling_philox(const DeviceDropout& dropout) {
  Philox philox = load_philox(dropout);
  if (!dropout.active) philox.either = 0xffffffffu, philox.lower = 0;
  return philox;
}

// The part of a tile to which a warp applies the dropout mask at a time. If kColumns is true and a layer has two warps,
// the part has the 64 rows of the warp's 32 columns, and line l of the warp's memory has the rows l and l + 32. In all
// other cases, the part that a warp masks at a time has 32 rows of all columns.
template <int kSplit, bool kColumns>
struct SiblingHalf {
  static constexpr bool kFolded = kSplit == 2 && kColumns;
  static constexpr int kCount = kSplit == 1 ? 2 : 1;  // number of parts of a tile that a warp masks one after the other

  // row and group return where this lane's first element lies in the tile: the row, and the group of eight columns.
  // sub: the warp's number among the warps of the layer.
  static __device__ __forceinline__ int row(int sub) {
    const int lane = threadIdx.x % kWarpSize;
    return lane / 8 + (kFolded ? lane % 8 / 4 * 32 : sub * 32);
  }
  static __device__ __forceinline__ int group(int sub) {
    const int slot = threadIdx.x % 8;
    return kFolded ? sub * 4 + slot % 4 : slot;
  }
};

// Writes the masked elements of a part of a tile to `to`. `from` is the address of this lane's first element of the
// part in the tile, and `to` is the address of that element in the warp's memory. `drawn` is the number of the Philox
// block of this element, and `drawn_step` is the number of Philox blocks in a row of x. bits: the mask's bits of the
// lane's elements of a tile, in four words of the layout of kKeptBits. Each call of sibling_mask shifts the bits of the
// previous call's rows to the left.
template <bool kBits>
__device__ __forceinline__ void sibling_mask(const Philox& philox, SharedAt from, SharedAt to, uint64_t drawn,
                                             uint32_t drawn_step, uint32_t (&bits)[4]) {
  // The outer loop is not unrolled, because the random draws of more than 16 rows at once would need too many
  // registers.
#pragma unroll 1
  for (int upper = 0; upper < 2; ++upper) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 words = kept_of_words(philox, drawn + static_cast<uint64_t>(drawn_step) * (4 * j));
      // Four lines further, group ^ line % 8 differs in bit 2, which is a distance of 64 bytes.
      const uint4 value = load_shared_16((from ^ (j % 2 * 64)) + j * 4 * 128);
      const uint32_t masks[4] = {spread_signs(words.x), spread_signs(words.y), spread_signs(words.z),
                                 spread_signs(words.w)};
      store_shared_16((to ^ (j % 2 * 64)) + j * 4 * 128,
                      make_uint4(value.x & masks[0], value.y & masks[1], value.z & masks[2], value.w & masks[3]));
      if constexpr (kBits) {
        bits[j] <<= 4;
#pragma unroll
        for (int w = 0; w < 4; ++w) bits[j] |= masks[w] & kKeptBits >> (12 + w);
      }
    }
    from = from + 16 * 128;
    to = to + 16 * 128;
    drawn += static_cast<uint64_t>(drawn_step) * 16;
  }
}

// Loads a 16 x 16 fragment of x, the A operand of mma.sync, as bfloat16 terms, from lines of 128 bytes. `at`: this
// lane's ldmatrix address.
template <typename T, bool kTransposed>
__device__ __forceinline__ void sibling_fragment(SharedAt at, uint32_t (&a)[kTermsOf<T>][4]) {
  uint32_t loaded[4];
  if constexpr (kTransposed) {
    ldmatrix_x4_trans(loaded, at);
  } else {
    ldmatrix_x4(loaded, at);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kTermsOf<T> > 1) {
      const float2 pair = unpack2<T>(loaded[i]);
      uint32_t terms[kTermsOf<T>];
      split_pair<kTermsOf<T>>(pair.x, pair.y, terms);
#pragma unroll
      for (int term = 0; term < kTermsOf<T>; ++term) a[term][i] = terms[term];
    } else {
      a[0][i] = loaded[i];
    }
  }
}

// Number of thread blocks, of kMostSiblingWarps warps each, that must fit on a multiprocessor; the compiler limits the
// registers of a thread so that these blocks fit. A float16 x has two terms, which need more registers, so that only
// one thread block must fit.
template <typename T>
constexpr int kSiblingBlocks = kTermsOf<T> > 1 ? 1 : 2;

// kRanks: number of tiles of 8 ranks, 2 or 4. kTerms: number of terms of the factors. kColumns: whether the results are
// dA_iᵀ; if false, the results are S_i. kDropped: whether one or more of the layers have dropout. A thread block has
// kRanks / 2 warps for each layer. Grid: x has chunks · ceil(rows / 64) thread blocks, or chunks · ceil(columns / 64)
// if kColumns is true.
template <typename T, int kRanks, int kTerms, bool kColumns, bool kDropped>
__global__ void __launch_bounds__(kMostSiblingWarps* kWarpSize, (kSiblingBlocks<T>))
    rank_siblings_kernel(SiblingsPass pass) {
  PEFT_EXT_KERNEL;
  constexpr int kSplit = kRanks / 2, kRuns = 4 / kSplit, kStages = kSiblingStages<kDropped>, kOnTheWay = kStages - 1;
  constexpr bool kRoomy = kRanks == 2 && !kColumns;  // if kColumns is true, `fresh` needs twice as many registers
  // Fragments of L are loaded only after the mask is drawn, because drawing the mask needs many registers too.
  constexpr bool kLate = kColumns;
  using Half = SiblingHalf<kSplit, kColumns>;
  using Factor = RankFactor<kRanks, kTerms, kRoomy>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, sub = warp % kSplit;
  const SiblingPart& part = pass.parts[warp / kSplit];
  const SharedAt stages = shared_at(dynamic_shared());
  const SharedAt masked = stages + (kStages * kSiblingTile + warp * kSiblingBytes);

  const uint32_t blocks = static_cast<uint32_t>(pass.chunks);
  const int64_t chunk = blockIdx.x % blocks, across = blockIdx.x / blocks, first = chunk * pass.tiles;
  const int64_t row_tile = kColumns ? first : across, column_tile = kColumns ? across : first;
  const int64_t row = row_tile * kRankTile, column = column_tile * kRankTile;
  const int tiles =
      static_cast<int>(min_of(pass.tiles, (kColumns ? pass.padded_rows : pass.padded_columns) / kRankTile - first));

  // This thread copies the group of eight columns `copy_group` of every copy_step-th row of a tile.
  const int copy_group = threadIdx.x % 8, copy_step = blockDim.x / 8;
  const uint32_t row_bytes = static_cast<uint32_t>(pass.columns * sizeof(T));
  // Distance in bytes, in global memory, from one tile of x to the next tile that this thread block reads: the next
  // tile along the columns, or, for dA, along the rows.
  const uint32_t tile_bytes = kColumns ? kRankTile * row_bytes : kRankTile * sizeof(T);
  const unsigned char* from =
      static_cast<const unsigned char*>(pass.dense) + (row * pass.columns + column + copy_group * kVector) * sizeof(T);
  int rows_left = static_cast<int>(min_of(pass.rows - row, 1 << 30));
  int columns_left = static_cast<int>(min_of(pass.columns - column, 1 << 30)) - copy_group * kVector;
  const auto issue = [&](bool there, int further, uint32_t stage) {
    if (there) {
      const int down = rows_left - (kColumns ? further * kRankTile : 0);
      const bool along = columns_left - (kColumns ? 0 : further * kRankTile) > 0;
#pragma unroll 1  // without unrolling, the loop needs fewer instructions and registers
      for (int r = threadIdx.x / 8; r < kRankTile; r += copy_step)
        cp_async_16(stages + (stage + r * 128 + (copy_group ^ r % 8) * 16),
                    from + (further * tile_bytes + r * row_bytes), along && r < down);
    }
    // A group of cp.async is also committed without loads, so that every cp_async_wait counts equally many groups.
    cp_async_commit();
  };

  [[maybe_unused]] const Philox philox = kDropped ? sibling_philox(part.dropout) : Philox{};
  // Computes where this lane's first element of the part that the warp masks lies in the tile and in the warp's memory.
  const int mask_row = Half::row(sub), mask_group = Half::group(sub), first_line = lane / 8, slot = lane % 8;
  const uint32_t mask_from = mask_row * 128 + (mask_group ^ mask_row % 8) * 16;
  const SharedAt mask_to = masked + (first_line * 128 + (slot ^ first_line) * 16);
  const uint32_t drawn_step = static_cast<uint32_t>(pass.columns / kPhiloxGroup);
  uint64_t drawn =
      static_cast<uint64_t>(row + mask_row) * drawn_step + static_cast<uint64_t>(column / kPhiloxGroup + mask_group);
  [[maybe_unused]] uint32_t* kept = nullptr;
  if constexpr (kColumns && kDropped) {
    if (part.kept != nullptr)
      kept = part.kept + (row_tile * (pass.padded_columns / kRankTile) + column_tile) * kRankThreads;
  }

  // `source`: offset of this lane's ldmatrix address in a tile, or in the warp's masked elements.
  constexpr bool kFolded = kDropped && Half::kFolded;
  const int lane_row = kColumns ? lane / 16 * 8 + lane % 8 : lane % 16;
  const int lane_group = kColumns ? lane / 8 % 2 + (Half::kFolded && !kDropped ? sub * 4 : 0) : lane / 16;
  const uint32_t source = lane_row * 128 + (lane_group ^ lane % 8) * 16;
  const uint4* factor_at = part.factor + first * Factor::kTile + lane;

  float sums[kRuns][kRanks][4] = {};
  Factor factor;
  if constexpr (!kRoomy && !kLate) factor.start(factor_at);
#pragma unroll
  for (int step = 0; step < kOnTheWay; ++step) issue(step < tiles, step, step * kSiblingTile);
  uint32_t stage = 0;
  for (int outer = 0; outer < tiles; ++outer) {
    if constexpr (kRoomy) factor.start(factor_at);
    cp_async_wait<kOnTheWay - 1>();
    sync_threads();  // after the barrier, the stage is full, and no thread reads the previous stage
    issue(outer + kOnTheWay < tiles, kOnTheWay, stage == 0 ? kOnTheWay * kSiblingTile : stage - kSiblingTile);
    const SharedAt tile = stages + stage;
    const uint4* next = outer + 1 < tiles ? factor_at + Factor::kTile : factor_at;

    // In each part of the tile, this warp multiplies kPartRuns groups of 16 rows, or of 16 columns if kColumns is true.
    constexpr int kPartRuns = kColumns ? kRuns : 2;
    [[maybe_unused]] uint32_t bits[4] = {};
    float fresh[kPartRuns][kRanks][4];
    const auto clear = [&] {
#pragma unroll
      for (int run = 0; run < kPartRuns; ++run)
#pragma unroll
        for (int n = 0; n < kRanks; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) fresh[run][n][i] = 0.0f;
    };
    // Adds to `fresh` the products of the steps 2 · `two` and 2 · `two` + 1 of the four steps of a tile. Each step sums
    // over 16 columns, or over 16 rows if kColumns is true.
    const auto multiply = [&](SharedAt at, int two) {
      if constexpr (kLate) {
#pragma unroll
        for (int term = kTerms - 1; term >= 0; --term) factor.load(factor_at, two, term);
      }
#pragma unroll
      for (int run = 0; run < kPartRuns; ++run) {
        uint32_t a[2][kTermsOf<T>][4];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          if constexpr (kColumns) {
            sibling_fragment<T, true>((at ^ (run * 32 + (kFolded ? two * 64 : 0))) + step * 16 * 128, a[step]);
          } else {
            sibling_fragment<T, false>((at ^ ((two * 2 + step) * 32)) + run * 16 * 128, a[step]);
          }
        }
#pragma unroll
        for (int term = kTerms - 1; term >= 0; --term) {
          uint32_t b[2][kRanks][2];
#pragma unroll
          for (int n = 0; n < kRanks; ++n) {
            const uint4 words = factor.held[two % Factor::kHeld][term][n];
            b[0][n][0] = words.x, b[0][n][1] = words.y, b[1][n][0] = words.z, b[1][n][1] = words.w;
          }
#pragma unroll
          for (int step = 0; step < 2; ++step)
            mma_terms<kRanks, kTermsOf<T>, kMaxTerms>(fresh[run], a[step], b[step], term);
          if constexpr (!kRoomy && !kLate) {
            if (run + 1 == kPartRuns) two == 0 ? factor.load(factor_at, 1, term) : factor.load(next, 0, term);
          }
        }
      }
    };
    const auto mask = [&](int half) {
      sync_warp();  // waits until all lanes of the warp have read the previous part of the tile
      sibling_mask<kColumns>(philox, tile + (mask_from + half * 32 * 128), mask_to,
                             drawn + static_cast<uint64_t>(drawn_step) * (half * 32), drawn_step, bits);
      sync_warp();
    };
    const auto add = [&](int to) {
#pragma unroll
      for (int run = 0; run < kPartRuns; ++run)
#pragma unroll
        for (int n = 0; n < kRanks; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[to + run][n][i] += fresh[run][n][i];
    };
    if constexpr (kColumns) {
      clear();
#pragma unroll
      for (int two = 0; two < 2; ++two) {
        if constexpr (kDropped) {
          if (!kFolded || two == 0) mask(two);
          multiply(masked + source, two);
        } else {
          multiply(tile + (source + two * 32 * 128), two);
        }
      }
      add(0);
      if constexpr (kDropped) {
        if (kept != nullptr) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            if constexpr (kFolded) {
              // The lanes of `slot` and of `slot` + 4 have the first and the last 32 rows of the same columns.
              const uint32_t own = bits[q] << (slot < 4 ? 8 : 0), all = own | shuffle_xor(own, 4);
              if (slot < 4) kept[(first_line + 4 * q) * 8 + sub * 4 + slot] = all;
            } else {
              kept[lane + q * kWarpSize] = bits[q];
            }
          }
          kept += pass.padded_columns / kRankTile * kRankThreads;
        }
      }
    } else {
#pragma unroll
      for (int part_of = 0; part_of < Half::kCount; ++part_of) {
        if constexpr (kDropped) mask(part_of);
        clear();
#pragma unroll
        for (int two = 0; two < 2; ++two)
          multiply(kDropped ? masked + source : tile + (source + (kSplit == 2 ? sub : part_of) * 32 * 128), two);
        add(part_of * 2);
      }
    }
    from += tile_bytes;
    factor_at += Factor::kTile;
    if constexpr (kColumns) {
      rows_left -= kRankTile;
      drawn += static_cast<uint64_t>(kRankTile) * drawn_step;
    } else {
      columns_left -= kRankTile;
      drawn += kRankTile / kPhiloxGroup;
    }
    stage = stage == kOnTheWay * kSiblingTile ? 0 : stage + kSiblingTile;
  }

  const int64_t padded = kColumns ? pass.padded_columns : pass.padded_rows;
  float* to =
      part.sums + (chunk * padded + across * kRankTile + sub * kRuns * 16 + lane / 4) * (kRanks * 8) + lane % 4 * 2;
#pragma unroll
  for (int run = 0; run < kRuns; ++run)
#pragma unroll
    for (int n = 0; n < kRanks; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(to + (run * 16 + half * 8) * (kRanks * 8) + n * 8) =
            make_float2(sums[run][n][2 * half], sums[run][n][2 * half + 1]);
}

}  // namespace peft_ext
