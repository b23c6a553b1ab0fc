// Declares the tile kernels, which compute the adapted linear layer in bfloat16 on CPUs with a bfloat16 product
// (AVX512-BF16, AMX, Arm's BF16). Each of these instruction sets has a table of the kernels, TileKernels. The letters
// in the formulas are those of linear/cpu/adapted_linear.h.
//
//   Forward: Z = x Wᵀ + S (ρB)ᵀ and Y = g (Z + b₀) + b₁. A block of sums has tokens as lanes and W's rows as rows.
//   Backward: dX = l ∘ (G W + mask/(1-p) ∘ (P A + H W)). A block of sums has W's columns as lanes and tokens as rows.
//   For several layers of one input, one block of sums holds the sum of the layers' dX.
//
// In the backward, G is g ∘ dY, P is (g ∘ dY) ρB, and l is in_scale. If dropout acts on the base too, as in PEFT's
// DoRA, G is dY and H is (g - 1) ∘ dY; otherwise there is no H. If dropout acts on the base too and drops few elements,
// the second product with all of W is replaced by a product with the dropped elements: see dropped_avx512.h.
//
// One microkernel serves the forward and the backward: C [rows, lanes] += left [rows, depth] right [depth, lanes],
// where the depth is summed in float32 from first to last. A panel over the whole of a large depth does not fit L2. The
// depth is therefore cut into parts, and a panel has one part of the depth at a time: all tokens of a kernel's call are
// multiplied with the first part, then with the second part, and the float32 sums of a block are carried from part to
// part in scratch memory. Cutting the depth into parts does not change the order of a sum, and so does not change the
// results. Operands are stored in tiles of 1 KiB. The tiles of a strip are in the order of the depth, with zeros beyond
// the end of the matrix:
//   left:  A tile of a left operand has 16 rows x 32 elements of the depth, in row-major order.
//   right: A tile of a right operand has 16 pairs of elements of the depth x 16 lanes x 2. The layout of a right
//          operand is AMX's VNNI layout, of which vdpbf16ps reads one register for each pair.
// With these layouts of the operands, the forward reads and decodes W's rows in row-major order, and transposes x once.
// The backward interleaves pairs of W's rows and copies G without transposing. On Arm the tiles of both operands are 8
// steps of the depth x 8 pairs x 2 x 4, see microkernel_neon.h. A panel of W is copied or decoded into scratch memory
// that stays in L2 while all tokens of a kernel's call are multiplied with the panel; for few strips of tokens, the
// forward may read or decode W's rows without a panel (rows_of and decoded_rows in block.h). No repacked copy of the
// whole W is made. A call of a kernel writes and rounds each element of Y or dX once.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "weight/packed_view.h"

namespace peft_ext {

constexpr int64_t kStrip = 16;      // number of rows or lanes in a strip
constexpr int64_t kTileDepth = 32;  // number of elements of the depth in a tile
constexpr int64_t kTile = kStrip * kTileDepth;
constexpr int64_t kPanelStep = 64;      // number of rows (in the backward: columns) of W in a panel
constexpr int64_t kReduceTokens = 512;  // number of tokens in one partial sum of grad_in_scale

// The frozen weight W [rows, columns]: dense, NF4, or in a format that `decode` decodes (see FormatKernels::decode).
struct TileWeight {
  const bf16* dense;
  const uint8_t* packed;  // NF4: codes
  const float* absmax;    // NF4: the float32 scales of all NF4 blocks
  int block_shift;        // NF4: blocksize is 1 << block_shift: a shift is much faster than a division
  int64_t rows, columns;
  void (*decode)(const PackedView& w, int64_t row, int64_t rows, int64_t begin, int64_t end, void* out, int64_t stride,
                 DType dtype) = nullptr;
  PackedView view{};  // packed W, as an argument of `decode`
  // Numbers of bytes of a row (row_bytes) and of kPanelStep columns of a row (step_bytes) in part 0 and in part 1 of a
  // weight that `decode` decodes; prefetches use these numbers. row_bytes and step_bytes are 0 if the part is not
  // stored row by row.
  int64_t row_bytes[2] = {}, step_bytes[2] = {};
};

// An Ahead describes the memory of the next panel of W. This memory is prefetched into L2 during the products with the
// present panel, a little at each step of the depth, so that memory and multiplier work at the same time. `left` is the
// number of runs of 128 bytes that remain. Every `every`-th step of the depth prefetches `each` runs of 128 bytes. The
// runs are not all prefetched at once, because runs that are prefetched long before their use may be displaced from L2.
// The runs lie in groups of `group` adjacent runs, and the groups are `stride` bytes apart.
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0, group = 1, left = 0, each = 0;
  int64_t every = 1;
  int64_t in_group = 0;  // number of runs of the present group that were prefetched
  int64_t skipped = 0;   // number of steps of the depth since the last prefetch

  void fetch() {
    if (++skipped < every) return;
    skipped = 0;
    for (int64_t i = 0; i < each && left > 0; ++i, --left) {
      __builtin_prefetch(at + in_group * 128, 0, 2);
      __builtin_prefetch(at + in_group * 128 + 64, 0, 2);
      if (++in_group < group) continue;
      in_group = 0;
      at += stride;
    }
  }
};

// An operand of a product in strips: `at` points to the first tile that is multiplied, and the strips are `stride`
// elements apart.
struct Strips {
  const bf16* at;
  int64_t stride;
};

// Arguments of the conversion of m [tokens, depth] to strips. The elements of m are multiplied by scale [depth] and
// rounded to bfloat16, and elements whose bit in `keep` is not set become zero.
struct TokenStrips {
  const bf16* m;
  int64_t tokens, depth;
  const float* scale;    // [depth], or null
  const uint32_t* keep;  // mask of dropout, or null: bit d % 32 of word d / 32 of a row is for column d
  int64_t keep_words;    // number of words in a row of `keep`
  bf16* strips;
};

// One adapter's low-rank term in a strip of tokens, in float32.
struct TileTerm {
  int64_t rank;
  const float* s;  // [rank, 16]
  const float* b;  // ρB [rows rounded up to 32, rank]
  uint16_t lanes;  // bit j: token j of the strip has this adapter; other tokens do not change, even if B is not finite
};

// DroppedEntries holds the elements of x that dropout drops. Token t has the entries [first[t], first[t + 1]). The
// upper 16 bits of an entry are the column, and the lower 16 bits are the element's value in bfloat16. A token's
// entries are padded to a multiple of kDroppedStep by entries with the value 0 and the last entry's column.
struct DroppedEntries {
  const int64_t* first = nullptr;
  uint32_t* entries = nullptr;
};
constexpr int64_t kDroppedStep = 4;
// Largest depth for which DroppedEntries are made, because an entry has 16 bits for the column. At a depth of
// kDroppedDepth, a panel and the panel's transpose together take half of kKeptScratchBytes (cpu/scratch.h).
constexpr int64_t kDroppedDepth = 65536;

// Arguments of the forward. If `dropped` is given, as in PEFT's DoRA with dropout on the base: Z = x̃ Wᵀ + S (ρB)ᵀ and
// Y = x Wᵀ + b₁ + g Z - x̃ Wᵀ.
struct TileForward {
  TileWeight weight;
  int64_t depth_part;  // number of tiles in a part of the depth; all tiles if `dropped` is given
  int64_t tokens;
  const bf16* x;                    // right strips of x; null if `rest` is given
  const bf16* dropped;              // right strips of mask ∘ x, or null
  float dropped_scale;              // 1/(1-p): x̃ is mask ∘ x times dropped_scale
  DroppedEntries rest;              // null, or, if `dropped` is given, the dropped elements of x
  int64_t rank;                     // rank of the low-rank term; 0: no low-rank term
  const float* s;                   // strips of S: [strips, rank, 16]
  const float* b;                   // ρB: [rows rounded up to 32, rank]
  const TileTerm* terms = nullptr;  // low-rank terms of a mixed batch, or null; those of strip i begin at first_term[i]
  const int64_t* first_term = nullptr;
  const float* scale;        // scale g [rows], or null
  const float* bias_before;  // bias b₀ [rows], or null
  const float* bias;         // bias b₁ [rows], or null
  bf16* y;                   // [tokens, rows]
  bf16* z;                   // receives Z + b₀ [tokens, rows], or null
};

struct TileBackward {
  TileWeight weight;
  int64_t depth_part;  // number of tiles in a part of all layers' depths; all tiles if `more` or `given` is set
  int64_t tokens;
  const bf16* grad;             // left strips of G, the left operand of the product with W
  const bf16* more;             // left strips of H, the left operand of DoRA's second product with W, or null
  const bf16* given = nullptr;  // dY [tokens, rows], if the dropped elements of dX are set to those of dY W; or null
  int64_t rank;                 // rank of the low-rank term; 0: no low-rank term
  const float* p;               // P = (g ∘ dY) ρB [tokens rounded up to 32, rank]
  const float* a;               // strips of A: [strips, rank, 16]
  const uint32_t* keep;
  int64_t keep_words;
  float keep_scale;
  const float* in_scale;  // IA3's vector l of input scales [columns], or null
  const bf16* x;          // x [tokens, columns], given with in_scale
  // Sums over tokens of x ∘ (dX / l), [ceil(tokens / kReduceTokens), columns], zero before the call.
  float* grad_in_scale;
  bf16* grad_x;       // [tokens, columns]
  bool onto = false;  // whether dX is added to the values in grad_x
};

constexpr int kMostLayers = 8;  // largest number of layers of one input whose dX is computed together

constexpr int64_t kFewestTokens = 8;  // largest number of tokens in a group of TileFewTokens

// Multiplies few tokens with the rows of a dense W in row-major order: y[t, row] = sum_k x[t, k] w[row, k]. W is read
// from memory once. x is packed, because in x's own layout the elements of one column would all fall into one set of
// the L1 cache if K is a multiple of 2,048.
struct TileFewTokens {
  const bf16* w;  // [rows, columns]
  int64_t rows, columns, tokens;
  const bf16* x;  // packed x, in groups of 8 tokens: [columns / 32 rounded up, 8 (or the rest), 32], zero-padded
  float* y;       // [tokens, rows]
};

struct TileKernels {
  // Cost of decoding a panel; the unit is the cost of the panel's product with one strip of tokens.
  int64_t decode_strips;
  void (*left_strips)(const TokenStrips& work, int64_t begin, int64_t end);
  void (*right_strips)(const TokenStrips& work, int64_t begin, int64_t end);
  // Writes the DroppedEntries of the tokens [begin, end). The caller of dropped_entries has set out.first.
  void (*dropped_entries)(const TokenStrips& work, const DroppedEntries& out, int64_t begin, int64_t end);
  // Computes the forward for the rows [begin, end) of W and the token strips [first, last). panel: memory for the
  // strips of these rows in one part of the depth, and for twice as much if `rest` is given (in the backward, if
  // `given` is not null). sums: memory for carried_sums(last - first, end - begin) floats, aligned to 64 bytes; unused
  // if all of the depth is one part.
  void (*forward)(const TileForward& work, int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel,
                  float* sums);
  // Computes dX for the columns [begin, end) of W and the token strips [first, last), summed over `count` layers with
  // the same tokens, columns and grad_x. A layer with in_scale must be alone, and the first token, first · kStrip, is
  // then a multiple of kReduceTokens.
  void (*backward)(const TileBackward* work, int count, int64_t begin, int64_t end, int64_t first, int64_t last,
                   bf16* panel, float* sums);
  // Multiplies the rows [begin, end) of w with few tokens. few_tokens is null on Arm, where PassKernels::few_tokens
  // multiplies up to kFewTokens tokens.
  void (*few_tokens)(const TileFewTokens& work, int64_t begin, int64_t end);
  // Packs x [tokens, columns] for TileFewTokens.
  void (*few_tokens_pack)(const float* x, int64_t tokens, int64_t columns, bf16* out);
};

// Returns the number of elements in the strips of a matrix [count, depth].
inline int64_t strips_elements(int64_t count, int64_t depth) {
  return ceil_div(count, kStrip) * ceil_div(depth, kTileDepth) * kTile;
}

// Returns the number of float32 sums for `count` rows or columns of W and `strips` token strips, with `count` and
// `strips` rounded up to whole blocks.
inline int64_t carried_sums(int64_t strips, int64_t count) {
  return ceil_div(strips, 2) * 2 * kStrip * ceil_div(count, 2 * kStrip) * 2 * kStrip;
}

#if defined(__x86_64__)
extern const TileKernels kTileKernelsAvx512Bf16;
extern const TileKernels kTileKernelsAmx;
// The table of the AMX kernels with emulated tile instructions, for tests on a CPU without AMX.
extern const TileKernels kTileKernelsAmxEmulated;
#elif defined(__aarch64__)  // the kernels exist only where the compiler supports Arm's BF16: see cpu/isa.h
extern const TileKernels kTileKernelsNeonBf16;
#endif

}  // namespace peft_ext
