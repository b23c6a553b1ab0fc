// The adapted linear layer in bfloat16 on CPUs that multiply it (AVX512-BF16, AMX, Arm's BF16): what each provides.
//
//   forward   Z = x Wᵀ + S (ρB)ᵀ                 Y = g (Z + b₀) + b₁          lanes: tokens     rows: W's rows
//   backward  dX = l ∘ (G W + mask/(1-p) ∘ (P A + H W))                       lanes: W's columns  rows: tokens
//             and of several layers of one input the sum of their dX, in one block of sums
//
// Where the base is dropped as well and few elements are, the second product with all of W is one with the few that the
// mask hides: see dropped.h.
//
// One microkernel serves both: C [rows, lanes] += left [rows, depth] right [depth, lanes], depth summed in float32 from
// first to last. Operands lie in tiles of 1 KiB, those of a strip in order of depth, zeros where the matrix ends:
//   left   16 rows x 32 of depth, as they come in a row-major matrix;
//   right  16 pairs of depth x 16 lanes x 2: what AMX calls VNNI, and vdpbf16ps takes as one register per pair.
// So forward reads W's rows as they lie, decoded from NF4 on the way, and x is transposed once; backward interleaves
// pairs of W's rows and copies G. On Arm either tile is 8 steps of the depth x 8 pairs x 2 x 4 (microkernel_neon.h). A
// panel of W is decoded into a scratch that stays in L2 while all tokens pass by;
// W is never repacked in memory. Y and dX are written once, rounded once.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

constexpr int64_t kStrip = 16;      // rows or lanes of a strip
constexpr int64_t kTileDepth = 32;  // depth of a tile
constexpr int64_t kTile = kStrip * kTileDepth;
constexpr int64_t kPanelStep = 64;      // rows or columns of W decoded together: a multiple of this, but the last
constexpr int64_t kReduceTokens = 512;  // tokens that grad_in_scale sums over before the sums are added in order

// W [rows, columns], dense or NF4 (absmax of all its blocks, float32).
struct TileWeight {
  const bf16* dense;
  const uint8_t* packed;
  const float* absmax;
  int block_shift;  // blocksize is 1 << block_shift: a division costs more than decoding 64 values
  int64_t rows, columns;
};

// What of W is fetched towards L2 while the panel before it is multiplied, a little at each step of the depth: memory
// and products go on at once. `left` runs of 128 bytes, `stride` bytes apart, `each` of them at a step.
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0, left = 0, each = 0;

  void fetch() {
    for (int64_t i = 0; i < each && left > 0; ++i, --left, at += stride) {
      __builtin_prefetch(at, 0, 2);
      __builtin_prefetch(at + 64, 0, 2);
    }
  }
};

// m [tokens, depth] times scale [depth] (product rounded to bfloat16), zero where keep has no bit: as strips.
struct TokenStrips {
  const bf16* m;
  int64_t tokens, depth;
  const float* scale;    // or null
  const uint32_t* keep;  // bit d % 32 of word d / 32 of each row, or null
  int64_t keep_words;    // in a row
  bf16* strips;
};

// One adapter's low-rank term in a strip of tokens, in float32.
struct TileTerm {
  int64_t rank;
  const float* s;  // [rank, 16]
  const float* b;  // ρB [rows rounded up to 32, rank]
  uint16_t lanes;  // the adapter's tokens: what is not finite in B stays with them
};

// The elements of x that dropout drops: of token t entries [first[t], first[t + 1]), each its column, shifted by 16,
// and its value. Their number is a multiple of kDroppedStep; behind the last one are zeros of the last one's column.
struct DroppedEntries {
  const int64_t* first = nullptr;
  uint32_t* entries = nullptr;
};
constexpr int64_t kDroppedStep = 4;
// At most: a column has 16 bits of an entry, and a panel, turned as well, takes half of the scratch that is kept.
constexpr int64_t kDroppedDepth = 65536;

struct TileForward {
  TileWeight weight;
  int64_t tokens;
  const bf16* x;        // right strips; null with `rest`
  const bf16* dropped;  // right strips of x without what dropout drops, or null; times dropped_scale it is x̃. Then
  float dropped_scale;  // Z = x̃ Wᵀ + S (ρB)ᵀ and Y = x Wᵀ + b₁ + g Z - x̃ Wᵀ, as PEFT's DoRA has it
  DroppedEntries rest;  // with `dropped`, the other part of x
  int64_t rank;         // 0: no low-rank term
  const float* s;       // strips of S: [strips, rank, 16]
  const float* b;       // ρB [rows rounded up to 32, rank]
  const TileTerm* terms = nullptr;  // or of several adapters: those of strip i are first_term[i] ... first_term[i + 1]
  const int64_t* first_term = nullptr;
  const float* scale;        // g [rows] or null
  const float* bias_before;  // b₀ [rows] or null
  const float* bias;         // b₁ [rows] or null
  bf16* y;                   // [tokens, rows]
  bf16* z;                   // [tokens, rows] or null: Z + b₀
};

struct TileBackward {
  TileWeight weight;
  int64_t tokens;
  const bf16* grad;             // left strips of G
  const bf16* more;             // left strips of H, or null
  const bf16* given = nullptr;  // dY [tokens, rows]: where the mask has no bit dX is dY W, whatever G is
  int64_t rank;                 // 0: no low-rank term
  const float* p;               // [tokens rounded up to 32, rank]
  const float* a;               // strips of A: [strips, rank, 16]
  const uint32_t* keep;
  int64_t keep_words;
  float keep_scale;
  const float* in_scale;  // l [columns] or null
  const bf16* x;          // [tokens, columns], with in_scale
  float* grad_in_scale;   // [ceil(tokens / kReduceTokens), columns], zeroed: sums of x ∘ (dX / l)
  bf16* grad_x;           // [tokens, columns]
  bool onto = false;      // grad_x is added to
};

constexpr int kMostLayers = 8;  // of one input, whose dX is made together

constexpr int64_t kFewestTokens = 8;  // whose sums with a few rows fit the registers

// Few tokens against the rows of a dense W as they lie, each read once: y[t, row] = sum_k x[t, k] w[row, k]. In x's own
// layout the tokens of one column would share a set of L1, where K is a multiple of 2,048.
struct TileFewTokens {
  const bf16* w;  // [rows, columns]
  int64_t rows, columns, tokens;
  const bf16* x;  // by 8 tokens: [columns / 32 rounded up, 8 (or the rest), 32], zeros behind the last column
  float* y;       // [tokens, rows]
};

struct TileKernels {
  int64_t decode_strips;  // what decoding a panel costs, in strips of 16 tokens that are multiplied with it
  void (*left_strips)(const TokenStrips& work, int64_t begin, int64_t end);
  void (*right_strips)(const TokenStrips& work, int64_t begin, int64_t end);
  // The entries of tokens [begin, end): out.first is set.
  void (*dropped_entries)(const TokenStrips& work, const DroppedEntries& out, int64_t begin, int64_t end);
  // Rows [begin, end) of W against the token strips [first, last); panel: room for kPanelStep of them as strips, twice
  // with `rest`, or in the backward `given`.
  void (*forward)(const TileForward& work, int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel);
  // Columns [begin, end) of W, likewise; first is a multiple of kReduceTokens where grad_in_scale is given.
  // Of `count` layers with the same tokens, columns and grad_x: one with in_scale is alone.
  void (*backward)(const TileBackward* work, int count, int64_t begin, int64_t end, int64_t first, int64_t last,
                   bf16* panel);
  // Rows [begin, end) of w; null where few tokens are not the tiles' own.
  void (*few_tokens)(const TileFewTokens& work, int64_t begin, int64_t end);
  // x [tokens, columns] as TileFewTokens takes it.
  void (*few_tokens_pack)(const float* x, int64_t tokens, int64_t columns, bf16* out);
};

// Elements of the strips of a matrix [count, depth].
inline int64_t strips_elements(int64_t count, int64_t depth) {
  return ceil_div(count, kStrip) * ceil_div(depth, kTileDepth) * kTile;
}

#if defined(__x86_64__)
extern const TileKernels kTileKernelsAvx512Bf16;
extern const TileKernels kTileKernelsAmx;
// The AMX kernels with the tile instructions in plain code: for tests on a CPU without AMX.
extern const TileKernels kTileKernelsAmxEmulated;
#elif defined(__aarch64__)  // where it compiles: see cpu/isa.h
extern const TileKernels kTileKernelsNeonBf16;
#endif

}  // namespace peft_ext
