// The last layer of a gated MLP has the input h = act(gate) ∘ up [T, F]. rank_gated_kernel computes in one pass:
//
//   rows:     h = act(gate) ∘ up;   S [T, R] = x̃ Aᵀ,   x̃ = mask ∘ h
//   columns:  d gate = dh ∘ up ∘ act'(gate);   d up = dh ∘ act(gate);   dAᵀ [F, R] = x̃ᵀ P,   with h computed again
//
// P is the matrix P of the layer (see backward_cuda.cpp), and dh is the gradient of h. A and Pᵀ are given as bfloat16
// terms (terms.cuh), as the factors F and L of rank_pass.cuh. gate, up and dh are bfloat16 or float16, and each group
// of eight columns is aligned to 16 bytes. h is rounded to this type before the products with A and P, because the
// product h Wᵀ also reads the rounded h.
//
// A thread block computes tiles of 64 x 64 elements of h. A thread copies eight columns of four rows of gate, up and dh
// by cp.async to shared memory that no other thread reads, computes these elements, stores the results, and writes the
// masked elements of h to a tile in shared memory, in the layout of a stage of rank_pass.cuh. While the block
// multiplies a tile, cp.async loads the operands of the next tile; two tiles of h take turns, so that one barrier for
// each tile is enough.
//
// The sums have the order of rank_pass.cuh, and the results have the same bits as those of gated_kernel and
// rank_pass_kernel one after the other (under the emulator; on a GPU, if the compiler contracts the products of both
// kernels alike). Bytes moved by a launch: gate, up and h once; for the gradients gate, up, dh, d gate and d up once;
// and the partial sums once.
#pragma once

#include "activations/activations.cuh"
#include "linear/cuda/rank_pass.cuh"

namespace peft_ext {

constexpr int kGatedTileBytes = kRankTile * 128;  // number of bytes of a tile of a 16-bit matrix

struct GatedPass {
  GatedWork gated;  // gate, up, dh and the results; `whole` must be true
  int64_t rows = 0, padded_rows = 0, padded_columns = 0;
  DeviceDropout dropout;
  const uint4* factor = nullptr;  // bfloat16 terms of A [ranks][columns]; for dA, of Pᵀ [ranks][rows]
  float* sums = nullptr;          // partial sums in the layout of RankPass's row_sums (for dA: of its column_sums)
  int64_t tiles = 1;              // number of tiles per thread block, along the columns (for dA: along the rows)
  int64_t chunks = 1;             // number of thread blocks among which a row (for dA: a column) of tiles is divided
};

// operands: for each of the matrices gate, up and dh, the four groups of eight elements of each thread.
template <int kMatrices>
struct GatedShared {
  unsigned char tile[2][kGatedTileBytes];
  uint4 operands[kMatrices][4][kRankThreads];
};

// kRanks: number of tiles of 8 ranks, 2 or 4. kTerms: number of terms of A; Pᵀ always has three terms. kColumns:
// whether the results are the gradients and dAᵀ; if false, the results are h and S. kDropped: whether the layer has
// dropout. Grid: x has chunks · ceil(rows / 64) thread blocks, or chunks · ceil(columns / 64) if kColumns is true.
template <typename T, int kRanks, int kTerms, bool kColumns, bool kDropped, bool kSilu>
__global__ void __launch_bounds__(kRankThreads, 3) rank_gated_kernel(GatedPass pass) {
  PEFT_EXT_KERNEL;
  constexpr int kMatrices = kColumns ? 3 : 2;
  using Shared = GatedShared<kMatrices>;
  PEFT_EXT_SHARED(Shared, shared);
  const GatedWork& work = pass.gated;
  const uint32_t blocks = static_cast<uint32_t>(pass.chunks);
  const int64_t chunk = blockIdx.x % blocks, across = blockIdx.x / blocks, first = chunk * pass.tiles;
  const int copy_row = threadIdx.x / 8, copy_group = threadIdx.x % 8;
  const int64_t row = (kColumns ? first : across) * kRankTile + copy_row;
  const int64_t column = (kColumns ? across : first) * kRankTile + copy_group * kVector;
  const int tiles =
      static_cast<int>(min_of(pass.tiles, (kColumns ? pass.padded_rows : pass.padded_columns) / kRankTile - first));

  // The addresses of this thread's first group of eight elements of the next tile to load, the elements from a row of a
  // tile to the row 16 rows below, and the elements from a tile to the next tile.
  const T* from[kMatrices];
  int64_t row_step[kMatrices], tile_step[kMatrices];
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) {
    const int64_t stride = m == 0 ? work.gate_stride : m == 1 ? work.up_stride : work.grad_stride;
    from[m] = static_cast<const T*>(m == 0 ? work.gate : m == 1 ? work.up : work.grad) + row * stride + column;
    row_step[m] = 16 * stride;
    tile_step[m] = kColumns ? kRankTile * stride : kRankTile;
  }
  int rows_left = static_cast<int>(min_of(pass.rows - row, 1 << 30));
  int columns_left = static_cast<int>(min_of(work.columns - column, 1 << 30));
  const SharedAt own = shared_at(shared.operands) + threadIdx.x * 16;
  const auto place = [&](int m, int j) { return own + (m * 4 + j) * kRankThreads * 16; };
  const auto copy = [&](int j, int down, int along) {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) cp_async_16(place(m, j), from[m] + j * row_step[m], j * 16 < down && along > 0);
  };
  T* to = static_cast<T*>(work.out) + row * work.out_stride + column;
  [[maybe_unused]] T* to_up =
      kColumns ? static_cast<T*>(work.out_up) + row * work.out_up_stride + column : static_cast<T*>(nullptr);

  [[maybe_unused]] const Philox philox = kDropped ? load_philox(pass.dropout) : Philox{};
  uint64_t drawn = static_cast<uint64_t>(row * work.columns + column) / kPhiloxGroup;
  const uint32_t drawn_step = static_cast<uint32_t>(work.columns * 16 / kPhiloxGroup);

  constexpr bool kRoomy = kRanks == 2;
  using Factor = RankFactor<kRanks, kTerms, kRoomy>;
  const uint4* factor_at = pass.factor + first * Factor::kTile + Factor::share(0);
  const SharedAt tile_at = shared_at(shared.tile);
  const SharedAt written = tile_at + rank_offset<T>(copy_row, copy_group);
  const SharedAt read = tile_at + ldmatrix_offset<kColumns, kRanks>();

#pragma unroll
  for (int j = 0; j < 4; ++j) copy(j, rows_left, columns_left);
  cp_async_commit();
  typename RankShare<kRanks>::Sums sums = {};
  float squares[RankShare<kRanks>::kRuns][2] = {};
  Factor factor;
  if constexpr (!kRoomy) factor.start(factor_at);
  uint32_t stage = 0;
  for (int outer = 0; outer < tiles; ++outer) {
    if constexpr (kRoomy) factor.start(factor_at);
    cp_async_wait<0>();
    const int next_rows = rows_left - (kColumns ? kRankTile : 0);
    const int next_columns = columns_left - (kColumns ? 0 : kRankTile);
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) from[m] += tile_step[m];
    // The loop is not unrolled, because the code of the activations is long.
#pragma unroll 1
    for (int j = 0; j < 4; ++j) {
      float gate[kVector], up[kVector], grad[kVector], h[kVector], of_gate[kVector], of_up[kVector];
      unpack_eight<T>(load_shared_16(place(0, j)), gate);
      unpack_eight<T>(load_shared_16(place(1, j)), up);
      if constexpr (kColumns) unpack_eight<T>(load_shared_16(place(2, j)), grad);
      // Without a barrier, cp.async may overwrite shared memory before this thread's earlier reads; the barrier orders
      // the reads first.
      sync_warp();
      if (outer + 1 < tiles) copy(j, next_rows, next_columns);
      gated_columns<true, kColumns>(kSilu ? Activation::kSilu : work.activation, gate, up, grad, h, of_gate, of_up);
      const uint4 words =
          make_uint4(pack2<T>(h[0], h[1]), pack2<T>(h[2], h[3]), pack2<T>(h[4], h[5]), pack2<T>(h[6], h[7]));
      if (j * 16 < rows_left && columns_left > 0) {
        if constexpr (kColumns) {
          save_vector(to + j * 16 * work.out_stride, of_gate);
          save_vector(to_up + j * 16 * work.out_up_stride, of_up);
        } else {
          *reinterpret_cast<uint4*>(to + j * 16 * work.out_stride) = words;
        }
      }
      uint4 kept = make_uint4(~0u, ~0u, ~0u, ~0u);
      if constexpr (kDropped) {
        const uint4 drawn_words = kept_of_words(philox, drawn + static_cast<uint64_t>(drawn_step) * j);
        kept = make_uint4(spread_signs(drawn_words.x), spread_signs(drawn_words.y), spread_signs(drawn_words.z),
                          spread_signs(drawn_words.w));
      }
      store_shared_16(written + (stage + j * 16 * kRankRow<T>),
                      make_uint4(words.x & kept.x, words.y & kept.y, words.z & kept.z, words.w & kept.w));
    }
    cp_async_commit();
    sync_threads();  // after the barrier, the tile is full, and no thread reads the other tile
    const uint4* next = outer + 1 < tiles ? factor_at + Factor::kTile : factor_at;
    rank_product<T, kColumns, false, kRanks>(nullptr, read + stage, factor, factor_at, next, sums, squares);
    factor_at += Factor::kTile;
    stage ^= kGatedTileBytes;
    if constexpr (kColumns) {
      rows_left -= kRankTile;
      drawn += 4 * static_cast<uint64_t>(drawn_step);
      to += kRankTile * work.out_stride;
      to_up += kRankTile * work.out_up_stride;
    } else {
      columns_left -= kRankTile;
      drawn += kRankTile / kPhiloxGroup;
      to += kRankTile;
    }
  }
  const int64_t padded = kColumns ? pass.padded_columns : pass.padded_rows;
  rank_store<kRanks>(pass.sums + (chunk * padded + across * kRankTile) * (kRanks * 8), kRanks * 8, sums);
}

}  // namespace peft_ext
