// The tile kernels but for the microkernel, in AVX-512 with BF16. Included after the target pragma and after
//   multiply(left, left_strips, right, right_strips, tiles, c, ahead), kRowsOfStep, kDecodeStrips:
//     c[i][j] += left strip i times right strip j, for up to 2 x 2 strips; c[i][j] is [16][16] float32, 1 KiB
//     and a step of `ahead` for each kRowsOfStep rows of it and each tile of the depth, or none
//   class TileUnit: an object lives while a task multiplies.
#pragma once

#include "common/simd_avx512.h"
#include "nf4/nf4_code.h"
#include "linear/tiles.h"

namespace peft_ext {
namespace {

constexpr int kBlockStrips = 2;  // strips of a block, either way
constexpr int kBlockElements = kBlockStrips * kBlockStrips * kStrip * kStrip;

inline int64_t tiles_of(int64_t depth) { return ceil_div(depth, kTileDepth); }

// --- W, decoded ------------------------------------------------------------------------------------------------------

// The 16 values of a block, rounded to bfloat16, twice: vpermw reads five bits of an index whose fifth is noise.
inline __m512i block_table(const TileWeight& w, int64_t block) {
  const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(kNf4Code), _mm512_set1_ps(w.absmax[block]));
  return _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(products)));
}

inline __m512i decode32(const uint8_t* packed, __m512i table) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
  return _mm512_permutexvar_epi16(index, table);
}

// Any run of a weight's flat elements, wherever its blocks and bytes begin.
inline void decode_run(const TileWeight& w, int64_t flat, int64_t count, bf16* out) {
  if (w.dense != nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = w.dense[flat + i];
    return;
  }
  for (int64_t i = 0; i < count;) {
    const int64_t at = flat + i, block = at >> w.block_shift;
    const int64_t stop = min_i64(((block + 1) << w.block_shift) - at, count - i);
    const __m512i table = block_table(w, block);
    alignas(64) uint16_t values[32];
    _mm512_store_si512(values, table);
    int64_t j = 0;
    if (at % 2 != 0) out[i + j++].bits = values[w.packed[at / 2] & 15];
    for (; j + 32 <= stop; j += 32) _mm512_storeu_si512(out + i + j, decode32(w.packed + (at + j) / 2, table));
    for (; j < stop; ++j) {
      const uint8_t byte = w.packed[(at + j) / 2];
      out[i + j].bits = values[(at + j) % 2 == 0 ? byte >> 4 : byte & 15];
    }
    i += stop;
  }
}

// Whether kPanelStep columns from a multiple of kPanelStep lie in one block of one row, on a whole byte.
inline bool aligned_blocks(const TileWeight& w) {
  return w.dense == nullptr && w.columns % kPanelStep == 0 && (int64_t{1} << w.block_shift) % kPanelStep == 0;
}

inline __mmask32 first_bits(int64_t count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1; }

// Up to 64 columns from `column`, a multiple of 64, of a row as two registers, zeros beyond `count`.
inline void decode64(const TileWeight& w, bool aligned, int64_t row, int64_t column, int64_t count, __m512i* out) {
  const int64_t flat = row * w.columns + column;
  if (aligned) {
    const __m512i table = block_table(w, flat >> w.block_shift);
    out[0] = decode32(w.packed + flat / 2, table);
    out[1] = decode32(w.packed + flat / 2 + 16, table);
    return;
  }
  if (w.dense != nullptr) {
    __mmask32 low = first_bits(count), high = first_bits(count - 32);
    if (w.keep != nullptr) {
      const uint32_t* words = w.keep + row * w.keep_words + column / 32;
      low &= words[0];
      if (high != 0) high &= words[1];
    }
    out[0] = _mm512_maskz_loadu_epi16(low, w.dense + flat);
    out[1] = _mm512_maskz_loadu_epi16(high, w.dense + flat + 32);
    return;
  }
  alignas(64) bf16 run[kPanelStep] = {};
  decode_run(w, flat, count, run);
  out[0] = _mm512_load_si512(run);
  out[1] = _mm512_load_si512(run + 32);
}

// Rows [begin, end) as left strips over the columns.
inline void weight_rows(const TileWeight& w, int64_t begin, int64_t end, bf16* panel) {
  const int64_t tiles = tiles_of(w.columns);
  const bool aligned = aligned_blocks(w);
  for (int64_t row = begin; row < ceil_div(end - begin, kStrip) * kStrip + begin; ++row) {
    const int64_t i = row - begin;
    bf16* out = panel + i / kStrip * tiles * kTile + i % kStrip * kTileDepth;
    for (int64_t d = 0; d < tiles; d += 2) {
      __m512i values[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      const int64_t column = d * kTileDepth;
      if (row < end) decode64(w, aligned, row, column, min_i64(kPanelStep, w.columns - column), values);
      _mm512_store_si512(out + d * kTile, values[0]);
      if (d + 1 < tiles) _mm512_store_si512(out + (d + 1) * kTile, values[1]);
    }
  }
}

inline const char* element_address(const TileWeight& w, int64_t flat) {
  return w.dense != nullptr ? reinterpret_cast<const char*>(w.dense + flat)
                            : reinterpret_cast<const char*>(w.packed + flat / 2);
}

constexpr int64_t kRowsAhead = 32;

// Columns [begin, end), begin a multiple of kPanelStep, as right strips over the rows.
inline void weight_lanes(const TileWeight& w, int64_t begin, int64_t end, bf16* panel) {
  const int64_t tiles = tiles_of(w.rows), strip = tiles * kTile;
  const bool aligned = aligned_blocks(w);
  __m512i low, high;  // words of two rows, alternating
  {
    alignas(64) uint16_t index[64];
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
    low = _mm512_load_si512(index);
    high = _mm512_load_si512(index + 32);
  }
  for (int64_t column = begin; column < end; column += kPanelStep) {
    const int64_t count = min_i64(kPanelStep, end - column);
    const int64_t strips = ceil_div(count, kStrip);
    bf16* base = panel + (column - begin) / kStrip * strip;
    for (int64_t row = 0; row < tiles * kTileDepth; row += 2) {
      __m512i even[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, odd[2] = {even[0], even[1]};
      // Rows are a page apart or half: the hardware does not look ahead from one to the next.
      for (int64_t ahead = row + kRowsAhead; ahead < min_i64(row + kRowsAhead + 2, w.rows); ++ahead)
        _mm_prefetch(element_address(w, ahead * w.columns + column), _MM_HINT_T0);
      if (row < w.rows) decode64(w, aligned, row, column, count, even);
      if (row + 1 < w.rows) decode64(w, aligned, row + 1, column, count, odd);
      bf16* out = base + row / kTileDepth * kTile + row % kTileDepth * kStrip;
      for (int64_t j = 0; j < strips; ++j)
        _mm512_store_si512(out + j * strip, _mm512_permutex2var_epi16(even[j / 2], j % 2 ? high : low, odd[j / 2]));
    }
  }
}

// The rows after `end`, which lie one after the other, and the columns after `end`, a run of each row: what the next
// panel is made of, in `steps`.
inline Ahead rows_ahead(const TileWeight& w, int64_t end, int64_t steps) {
  const int64_t rows = min_i64(kPanelStep, w.rows - end);
  const char* at = element_address(w, end * w.columns);
  const int64_t runs = (element_address(w, (end + rows) * w.columns) - at) / 128;
  return rows > 0 && steps > 0 ? Ahead{at, 128, runs, ceil_div(runs, steps)} : Ahead{};
}

inline Ahead columns_ahead(const TileWeight& w, int64_t end, int64_t steps) {
  const int64_t stride = element_address(w, w.columns) - element_address(w, 0);
  return end < w.columns && steps > 0 ? Ahead{element_address(w, end), stride, w.rows, ceil_div(w.rows, steps)}
                                      : Ahead{};
}

inline void multiply(const bf16* left, int left_strips, const bf16* right, int right_strips, int64_t tiles, float* c) {
  Ahead nothing;
  multiply(left, left_strips, right, right_strips, tiles, c, &nothing);
}

// --- tokens ----------------------------------------------------------------------------------------------------------

inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
      r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// 32 columns from d of a row of m, zeros beyond the matrix.
inline __m512i token_values(const TokenStrips& work, int64_t row, int64_t d) {
  if (row >= work.tokens) return _mm512_setzero_si512();
  const int64_t left = work.depth - d;
  const __mmask32 inside = left >= 32 ? 0xffffffffu : (1u << left) - 1;
  __mmask32 mask = inside;
  if (work.keep != nullptr) mask &= work.keep[row * work.keep_words + d / 32];
  __m512i values = _mm512_maskz_loadu_epi16(mask, work.m + row * work.depth + d);
  if (work.scale == nullptr) return values;
  const auto half = [&](__m256i words, __mmask16 within, const float* scale) {
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    return round_bf16(_mm512_mul_ps(wide, _mm512_maskz_loadu_ps(within, scale)));
  };
  const __m256i low = half(_mm512_castsi512_si256(values), static_cast<__mmask16>(inside), work.scale + d);
  const __m256i high =
      half(_mm512_extracti64x4_epi64(values, 1), static_cast<__mmask16>(inside >> 16), work.scale + d + 16);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

void left_strips(const TokenStrips& work, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(work.depth);
  for (int64_t strip = begin; strip < end; ++strip)
    for (int64_t i = 0; i < kStrip; ++i)
      for (int64_t d = 0; d < tiles; ++d)
        _mm512_store_si512(work.strips + (strip * tiles + d) * kTile + i * kTileDepth,
                           token_values(work, strip * kStrip + i, d * kTileDepth));
}

void right_strips(const TokenStrips& work, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(work.depth);
  for (int64_t strip = begin; strip < end; ++strip)
    for (int64_t d = 0; d < tiles; ++d) {
      __m512i values[16];
      for (int64_t i = 0; i < kStrip; ++i) values[i] = token_values(work, strip * kStrip + i, d * kTileDepth);
      transpose16(values);
      for (int64_t i = 0; i < kStrip; ++i)
        _mm512_store_si512(work.strips + (strip * tiles + d) * kTile + i * 2 * kStrip, values[i]);
    }
}

// --- a block of sums -------------------------------------------------------------------------------------------------

struct Block {
  alignas(64) float c[kBlockElements];
  int left, right;  // strips

  float* part(int i, int j) { return c + (i * kBlockStrips + j) * kStrip * kStrip; }
  void clear() {
    for (int i = 0; i < kBlockElements; i += 16) _mm512_store_ps(c + i, _mm512_setzero_ps());
  }
  // f(row's vector, row of the block, right strip) -> vector, for every row of every part.
  template <typename F>
  void each(const F& f) {
    for (int i = 0; i < left; ++i)
      for (int j = 0; j < right; ++j)
        for (int r = 0; r < kStrip; ++r) {
          float* row = part(i, j) + r * kStrip;
          _mm512_store_ps(row, f(_mm512_load_ps(row), i * kStrip + r, j));
        }
  }
};

// Column j of the block's parts: c += left [rows, rank] right [rank, 16], in float32: the low-rank term of `lanes`.
inline void add_low_rank(const float* left, const float* right, int64_t rank, int j, Block* block,
                         __mmask16 lanes = 0xffff) {
  for (int i = 0; i < block->left; ++i) {
    float* c = block->part(i, j);
    __m512 sums[kStrip];
    for (int r = 0; r < kStrip; ++r) sums[r] = _mm512_load_ps(c + r * kStrip);
    const float* rows = left + i * kStrip * rank;
    for (int64_t q = 0; q < rank; ++q) {
      const __m512 lane = _mm512_loadu_ps(right + q * kStrip);
      for (int r = 0; r < kStrip; ++r)
        sums[r] = _mm512_mask3_fmadd_ps(_mm512_set1_ps(rows[r * rank + q]), lane, sums[r], lanes);
    }
    for (int r = 0; r < kStrip; ++r) _mm512_store_ps(c + r * kStrip, sums[r]);
  }
}

// The same of every column; right [strips, rank, 16].
inline void add_low_rank(const float* left, const float* right, int64_t rank, Block* block) {
  for (int j = 0; j < block->right; ++j) add_low_rank(left, right + j * rank * kStrip, rank, j, block);
}

// Two rows of 16 floats, one after the other, rounded; `count` of the 32 are stored.
inline void store_row(bf16* out, __m512 first, __m512 second, int64_t count) {
  const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(round_bf16(first)), round_bf16(second), 1);
  if (count >= 32)
    _mm512_storeu_si512(out, words);
  else
    _mm512_mask_storeu_epi16(out, (1u << count) - 1, words);
}

// The block, whose rows are columns of out and whose lanes are rows of out, transposed into out [tokens, columns].
inline void store_transposed(Block* block, bf16* out, int64_t token, int64_t tokens, int64_t column, int64_t columns) {
  for (int j = 0; j < block->right; ++j) {
    __m512i rows[kBlockStrips][kStrip];
    for (int i = 0; i < kBlockStrips; ++i) {
      for (int r = 0; r < kStrip; ++r)
        rows[i][r] = i < block->left ? _mm512_load_si512(block->part(i, j) + r * kStrip) : _mm512_setzero_si512();
      if (i < block->left) transpose16(rows[i]);
    }
    const int64_t first = token + j * kStrip;
    for (int64_t t = 0; t < min_i64(kStrip, tokens - first); ++t)
      store_row(out + (first + t) * columns + column, _mm512_castsi512_ps(rows[0][t]), _mm512_castsi512_ps(rows[1][t]),
                min_i64(columns - column, 2 * kStrip));
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

inline float value_at(const float* values, int64_t i, int64_t count, float otherwise) {
  return values != nullptr && i < count ? values[i] : otherwise;
}

inline void forward_block(const TileForward& work, int64_t row, int64_t strip, const bf16* rows, Block* block,
                          Block* base, Ahead* ahead) {
  const int64_t n = work.weight.rows, tiles = tiles_of(work.weight.columns), length = tiles * kTile;
  const bf16* x = work.x + strip * length;
  const auto low_rank = [&] {
    const int64_t depth = tiles_of(work.rank_depth);
    if (depth > 0)
      multiply(work.b_strips + row / kStrip * depth * kTile, block->left, work.s_strips + strip * depth * kTile,
               block->right, depth, block->c);
    if (work.rank > 0) add_low_rank(work.b + row * work.rank, work.s + strip * work.rank * kStrip, work.rank, block);
    if (work.terms == nullptr) return;
    for (int j = 0; j < block->right; ++j)
      for (int64_t q = work.first_term[strip + j]; q < work.first_term[strip + j + 1]; ++q) {
        const TileTerm& term = work.terms[q];
        add_low_rank(term.b + row * term.rank, term.s, term.rank, j, block, term.lanes);
      }
  };
  const auto scale = [&](int r) { return _mm512_set1_ps(value_at(work.scale, row + r, n, 1.0f)); };
  block->clear();
  if (work.dropped != nullptr) {
    multiply(rows, block->left, work.dropped + strip * length, block->right, tiles, block->c);
    const __m512 by = _mm512_set1_ps(work.dropped_scale);
    block->each([&](__m512 v, int, int) { return _mm512_mul_ps(v, by); });
    *base = *block;
  }
  low_rank();
  if (work.dropped == nullptr) multiply(rows, block->left, x, block->right, tiles, block->c, ahead);
  if (work.bias_before != nullptr)
    block->each([&](__m512 v, int r, int) {
      return _mm512_add_ps(v, _mm512_set1_ps(value_at(work.bias_before, row + r, n, 0.0f)));
    });
  if (work.z != nullptr) store_transposed(block, work.z, strip * kStrip, work.tokens, row, n);
  if (work.dropped != nullptr) {
    block->each([&](__m512 v, int r, int j) {
      const __m512 without = _mm512_load_ps(base->part(r / kStrip, j) + r % kStrip * kStrip);
      return _mm512_fmsub_ps(scale(r), v, without);
    });
    multiply(rows, block->left, x, block->right, tiles, block->c);
  }
  if (work.scale != nullptr || work.bias != nullptr)
    block->each([&](__m512 v, int r, int) {
      if (work.dropped == nullptr) v = _mm512_mul_ps(v, scale(r));
      return _mm512_add_ps(v, _mm512_set1_ps(value_at(work.bias, row + r, n, 0.0f)));
    });
  store_transposed(block, work.y, strip * kStrip, work.tokens, row, n);
}

void forward(const TileForward& work, int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel) {
  const TileUnit unit;
  const int64_t length = tiles_of(work.weight.columns) * kTile;
  weight_rows(work.weight, begin, end, panel);
  Block block, base;
  const int64_t pairs = ceil_div(last - first, kBlockStrips);
  Ahead ahead = rows_ahead(work.weight, end, pairs * ceil_div(end - begin, kRowsOfStep) * length / kTile);
  for (int64_t strip = first; strip < last; strip += kBlockStrips) {
    block.right = static_cast<int>(min_i64(kBlockStrips, last - strip));
    for (int64_t row = begin; row < end; row += kBlockStrips * kStrip) {
      block.left = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - row, kStrip)));
      forward_block(work, row, strip, panel + (row - begin) / kStrip * length, &block, &base, &ahead);
    }
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

inline void backward_block(const TileBackward& work, int64_t column, int64_t strip, const bf16* lanes, Block* block,
                           Ahead* ahead) {
  const int64_t k = work.weight.columns, tiles = tiles_of(work.weight.rows), length = tiles * kTile;
  const int64_t token = strip * kStrip;
  const int64_t depth = tiles_of(work.rank_depth);
  const bool low = work.rank > 0 || depth > 0 || work.more != nullptr;
  block->clear();
  if (depth > 0)
    multiply(work.p_strips + strip * depth * kTile, block->left, work.a_strips + column / kStrip * depth * kTile,
             block->right, depth, block->c);
  if (work.rank > 0)
    add_low_rank(work.p + token * work.rank, work.a + column / kStrip * work.rank * kStrip, work.rank, block);
  if (work.more != nullptr) multiply(work.more + strip * length, block->left, lanes, block->right, tiles, block->c);
  if (low && work.keep != nullptr) {
    const __m512 by = _mm512_set1_ps(work.keep_scale);
    block->each([&](__m512 v, int r, int j) {
      if (token + r >= work.tokens) return v;
      const uint32_t word = work.keep[(token + r) * work.keep_words + (column + j * kStrip) / 32];
      const auto bits = static_cast<__mmask16>(word >> ((column + j * kStrip) % 32));
      return _mm512_maskz_mul_ps(bits, v, by);
    });
  }
  multiply(work.grad + strip * length, block->left, lanes, block->right, tiles, block->c, ahead);
  if (work.in_scale != nullptr) {
    float* sums = work.grad_in_scale + token / kReduceTokens * k;
    block->each([&](__m512 v, int r, int j) {
      const int64_t at = column + j * kStrip;
      if (token + r >= work.tokens || at >= k) return v;
      const auto inside = static_cast<__mmask16>(k - at >= kStrip ? 0xffff : (1u << (k - at)) - 1);
      const __m256i words = _mm256_maskz_loadu_epi16(inside, work.x + (token + r) * k + at);
      const __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
      const __m512 sum = _mm512_fmadd_ps(x, v, _mm512_maskz_loadu_ps(inside, sums + at));
      _mm512_mask_storeu_ps(sums + at, inside, sum);
      return _mm512_mul_ps(v, _mm512_maskz_loadu_ps(inside, work.in_scale + at));
    });
  }
  for (int i = 0; i < block->left; ++i)
    for (int64_t r = 0; r < min_i64(kStrip, work.tokens - token - i * kStrip); ++r) {
      const __m512 one = _mm512_load_ps(block->part(i, 0) + r * kStrip);
      const __m512 two = block->right > 1 ? _mm512_load_ps(block->part(i, 1) + r * kStrip) : _mm512_setzero_ps();
      store_row(work.grad_x + (token + i * kStrip + r) * k + column, one, two, min_i64(k - column, 2 * kStrip));
    }
}

void backward(const TileBackward& work, int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel) {
  const TileUnit unit;
  const int64_t length = tiles_of(work.weight.rows) * kTile;
  weight_lanes(work.weight, begin, end, panel);
  Block block;
  const int64_t pairs = ceil_div(end - begin, kBlockStrips * kStrip);
  Ahead ahead =
      columns_ahead(work.weight, end, pairs * ceil_div((last - first) * kStrip, kRowsOfStep) * length / kTile);
  for (int64_t strip = first; strip < last; strip += kBlockStrips) {
    block.left = static_cast<int>(min_i64(kBlockStrips, last - strip));
    for (int64_t column = begin; column < end; column += kBlockStrips * kStrip) {
      block.right = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - column, kStrip)));
      backward_block(work, column, strip, panel + (column - begin) / kStrip * length, &block, &ahead);
    }
  }
}

// --- few tokens ------------------------------------------------------------------------------------------------------

void few_tokens_pack(const float* x, int64_t tokens, int64_t columns, bf16* out) {
  if (tokens > kFewestTokens) {
    few_tokens_pack(x, kFewestTokens, columns, out);
    few_tokens_pack(x + kFewestTokens * columns, tokens - kFewestTokens, columns,
                    out + kFewestTokens * tiles_of(columns) * kTileDepth);
    return;
  }
  for (int64_t j = 0; j < columns; j += kTileDepth)
    for (int64_t t = 0; t < tokens; ++t) {
      const __mmask32 inside = first_bits(columns - j);
      const float* from = x + t * columns + j;
      const __m256i low = round_bf16(_mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), from));
      const __m256i high = round_bf16(_mm512_maskz_loadu_ps(static_cast<__mmask16>(inside >> 16), from + 16));
      _mm512_storeu_si512(out + (j * tokens + t * kTileDepth),
                          _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
}

// kRows rows at once, so that a register of x serves them all; of their length, x's tokens side by side stream through
// L1 but for few inputs. A row's sum is the same beside others and alone.
template <int kTokens, int kRows>
inline void few_tokens_block(const TileFewTokens& work, int64_t row) {
  // A sum waits for the product before it: four or more of them keep the unit busy.
  constexpr int kSums = kTokens == 1 ? 4 : kTokens <= 3 ? 2 : 1;
  const int64_t k = work.columns;
  __m512 sums[kRows][kTokens][kSums];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) sums[r][t][s] = _mm512_setzero_ps();
  const auto step = [&](int64_t j, int s, __mmask32 inside) {
    __m512bh w[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      w[r] = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(inside, work.w + (row + r) * k + j));
    const bf16* packed = work.x + j * kTokens;
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const auto x = reinterpret_cast<__m512bh>(_mm512_loadu_si512(packed + t * kTileDepth));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][t][s] = _mm512_dpbf16_ps(sums[r][t][s], x, w[r]);
    }
  };
  int64_t j = 0;
  for (; j + kTileDepth * kSums <= k; j += kTileDepth * kSums)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) step(j + kTileDepth * s, s, 0xffffffffu);
  for (; j < k; j += kTileDepth) step(j, 0, first_bits(k - j));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      __m512 total = sums[r][t][0];
#pragma GCC unroll 4
      for (int s = 1; s < kSums; ++s) total = _mm512_add_ps(total, sums[r][t][s]);
      work.y[t * work.rows + row + r] = _mm512_reduce_add_ps(total);
    }
}

template <int kTokens>
inline void few_tokens_of(const TileFewTokens& work, int64_t begin, int64_t end) {
  constexpr int kRows = kTokens == 1 ? 2 : kTokens <= 6 ? 4 : 3;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) few_tokens_block<kTokens, kRows>(work, row);
  for (; row < end; ++row) few_tokens_block<kTokens, 1>(work, row);
}

// Of at most 8 tokens.
inline void few_tokens_group(const TileFewTokens& work, int64_t begin, int64_t end) {
  switch (work.tokens) {
    case 1:
      return few_tokens_of<1>(work, begin, end);
    case 2:
      return few_tokens_of<2>(work, begin, end);
    case 3:
      return few_tokens_of<3>(work, begin, end);
    case 4:
      return few_tokens_of<4>(work, begin, end);
    case 5:
      return few_tokens_of<5>(work, begin, end);
    case 6:
      return few_tokens_of<6>(work, begin, end);
    case 7:
      return few_tokens_of<7>(work, begin, end);
    default:
      return few_tokens_of<8>(work, begin, end);
  }
}

void few_tokens(const TileFewTokens& work, int64_t begin, int64_t end) {
  if (work.tokens <= kFewestTokens) return few_tokens_group(work, begin, end);
  // All groups of tokens pass by a few rows, which stay in L2 meanwhile: W is read from memory once.
  constexpr int64_t kRows = 12;  // a multiple of what a block of any number of tokens takes
  const int64_t length = tiles_of(work.columns) * kTileDepth;
  for (int64_t row = begin; row < end; row += kRows)
    for (int64_t t = 0; t < work.tokens; t += kFewestTokens) {
      TileFewTokens group = work;
      group.tokens = min_i64(kFewestTokens, work.tokens - t);
      group.x += t * length;
      group.y += t * work.rows;
      few_tokens_group(group, row, min_i64(row + kRows, end));
    }
}

// --- the rank's own products -----------------------------------------------------------------------------------------

void shrink(const TileShrink& work, int64_t begin, int64_t end, bf16* panel) {
  const TileUnit unit;
  const int64_t tiles = tiles_of(work.m.columns), length = tiles * kTile, ranks = work.rank_strips * kStrip;
  weight_rows(work.m, begin, end, panel);
  const __m512 scale = _mm512_set1_ps(work.scale);
  Block block;
  for (int64_t row = begin; row < end; row += kBlockStrips * kStrip) {
    block.left = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - row, kStrip)));
    const bf16* rows = panel + (row - begin) / kStrip * length;
    for (int64_t strip = 0; strip < work.rank_strips; ++strip) {
      block.clear();
      for (int term = 0; term < work.terms; term += kBlockStrips)
        multiply(rows, block.left, work.a + (strip * work.terms + term) * length,
                 static_cast<int>(min_i64(kBlockStrips, work.terms - term)), tiles, block.c);
      for (int64_t i = 0; i < min_i64(end - row, kBlockStrips * kStrip); ++i) {
        const int part = static_cast<int>(i / kStrip);
        const __m512 sums = _mm512_add_ps(_mm512_load_ps(block.part(part, 0) + i % kStrip * kStrip),
                                          _mm512_load_ps(block.part(part, 1) + i % kStrip * kStrip));
        _mm512_storeu_ps(work.out + (row + i) * ranks + strip * kStrip, _mm512_mul_ps(sums, scale));
      }
    }
    if (work.squares == nullptr) continue;
    for (int64_t i = 0; i < min_i64(end - row, kBlockStrips * kStrip); ++i) {
      const bf16* values = rows + i / kStrip * length + i % kStrip * kTileDepth;
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int64_t d = 0; d < tiles; ++d) {
        const __m512i pair = _mm512_load_si512(values + d * kTile);
        const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-65536)));
        even = _mm512_fmadd_ps(low, low, even);
        odd = _mm512_fmadd_ps(high, high, odd);
      }
      work.squares[row + i] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    }
  }
}

void outer(const TileOuter& work, int64_t begin, int64_t end, bf16* panel) {
  const TileUnit unit;
  const int64_t tiles = tiles_of(work.m.rows), length = tiles * kTile, ranks = work.rank_strips * kStrip;
  weight_lanes(work.m, begin, end, panel);
  Block block;
  for (int64_t column = begin; column < end; column += kBlockStrips * kStrip) {
    block.right = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - column, kStrip)));
    for (int64_t strip = 0; strip < work.rank_strips; ++strip) {
      block.clear();
      for (int term = 0; term < work.terms; term += kBlockStrips)
        multiply(work.left + (strip * work.terms + term) * length,
                 static_cast<int>(min_i64(kBlockStrips, work.terms - term)), panel + (column - begin) / kStrip * length,
                 block.right, tiles, block.c);
      for (int64_t j = 0; j < min_i64(end - column, kBlockStrips * kStrip); ++j) {
        const float* one = block.part(0, static_cast<int>(j / kStrip)) + j % kStrip;
        const float* two = block.part(1, static_cast<int>(j / kStrip)) + j % kStrip;
        for (int64_t r = 0; r < kStrip; ++r)
          work.out[(column + j) * ranks + strip * kStrip + r] = work.scale * (one[r * kStrip] + two[r * kStrip]);
      }
    }
  }
}

}  // namespace
}  // namespace peft_ext
