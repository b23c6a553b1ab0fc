// Computes the products with the few elements that dropout drops, if dropout acts on the base too, as in PEFT's DoRA.
// Include this file after the target pragma (cpu/target_<isa>.h).
//
//   forward:  x Wᵀ = D + E. D = (mask ∘ x) Wᵀ is the product with the kept elements of x, which x̃ Wᵀ needs too.
//             E is the product with the dropped elements of x:
//             E[t] = sum over dropped k of x[t, k] W[:, k]. E is computed from the transpose of W. One dot product
//             instruction multiplies elements of two columns of W with two elements of x.
//   backward: One product computes dX, without the low-rank part of dX, for all kept elements:
//             dX = (dY ∘ (1 + (g - 1) / (1 - p))) W.
//             One dot product computes dX for each dropped element: dX[t, k] = dY[t] · W[:, k].
//
// Forward and backward need the transpose of W. Therefore the kernels transpose each panel of W once, into the memory
// after the panel's strips.
#pragma once

#include "linear/cpu/tiles/block.h"
#include "linear/cpu/tiles/panels.h"

namespace peft_ext {
namespace {

// Returns indices that select every second word of two registers, beginning at word `from`.
inline __m512i alternate_words(int from) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(2 * i + from);
  return _mm512_load_si512(index);
}

// Transposes a panel of W that is stored as left strips: each row of out [32 · tiles, kPanelStep] is a column of W.
inline void turn_rows(const bf16* panel, int64_t strips, int64_t tiles, bf16* out) {
  const __m512i even = alternate_words(0), odd = alternate_words(1);
  for (int64_t half = 0; half < ceil_div(strips, 2); ++half)
    for (int64_t d = 0; d < tiles; ++d) {
      __m512i pairs[2][kStrip];
      for (int64_t s = 0; s < 2; ++s) {
        const bf16* tile = panel + ((2 * half + s) * tiles + d) * kTile;
        for (int64_t i = 0; i < kStrip; ++i)
          pairs[s][i] = 2 * half + s < strips ? _mm512_load_si512(tile + i * kTileDepth) : _mm512_setzero_si512();
        transpose16(pairs[s]);
      }
      bf16* to = out + d * kTileDepth * kPanelStep + half * 2 * kStrip;
      for (int64_t p = 0; p < kStrip; ++p) {
        _mm512_store_si512(to + 2 * p * kPanelStep, _mm512_permutex2var_epi16(pairs[0][p], even, pairs[1][p]));
        _mm512_store_si512(to + (2 * p + 1) * kPanelStep, _mm512_permutex2var_epi16(pairs[0][p], odd, pairs[1][p]));
      }
    }
}

// Converts a panel of W that is stored as right strips: each row of out [16 · strips, 32 · tiles] is a lane of the
// panel, a column of W.
inline void turn_lanes(const bf16* panel, int64_t strips, int64_t tiles, bf16* out) {
  for (int64_t s = 0; s < strips; ++s)
    for (int64_t d = 0; d < tiles; ++d) {
      __m512i pairs[kStrip];
      for (int64_t p = 0; p < kStrip; ++p)
        pairs[p] = _mm512_load_si512(panel + (s * tiles + d) * kTile + p * 2 * kStrip);
      transpose16(pairs);
      for (int64_t i = 0; i < kStrip; ++i)
        _mm512_store_si512(out + ((s * kStrip + i) * tiles + d) * kTileDepth, pairs[i]);
    }
}

// The kernel TileKernels::dropped_entries.
void dropped_entries(const TokenStrips& work, const DroppedEntries& out, int64_t begin, int64_t end) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t t = begin; t < end; ++t) {
    uint32_t* to = out.entries + out.first[t];
    for (int64_t k = 0; k < work.depth; k += kStrip) {
      const uint32_t hidden = ~work.keep[t * work.keep_words + k / 32] >> k % 32;
      const auto inside = static_cast<__mmask16>(first_bits(min_i64(kStrip, work.depth - k)));
      const auto mask = static_cast<__mmask16>(hidden & inside);
      const __m512i values = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, work.m + t * work.depth + k));
      const __m512i columns = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(k)));
      const __m512i entries = _mm512_or_si512(values, _mm512_slli_epi32(columns, 16));
      // The store must not write beyond this token's entries, because another thread may write the next token's
      // entries.
      const int count = __builtin_popcount(mask);
      _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(first_bits(count)),
                               _mm512_maskz_compress_epi32(mask, entries));
      to += count;
    }
    const uint32_t last = to > out.entries + out.first[t] ? to[-1] & 0xffff0000u : 0u;
    while (to < out.entries + out.first[t + 1]) *to++ = last;
  }
}

// Computes out [kPanelStep], the sum over one token's DroppedEntries of the entry's value times the entry's column of
// W. The columns of W are the rows of `turned`, of which only the first kHalves * 32 values are used.
template <int kHalves>
inline void dropped_sums(const uint32_t* entries, int64_t count, const bf16* turned, float* out) {
  constexpr int kPairs = static_cast<int>(kDroppedStep) / 2;
  __m512 sums[kPairs][kHalves][2];
  for (auto& pair : sums)
    for (auto& half : pair) half[0] = half[1] = _mm512_setzero_ps();
  for (int64_t e = 0; e < count; e += kDroppedStep)
    for (int q = 0; q < kPairs; ++q) {
      const uint32_t one = entries[e + 2 * q], two = entries[e + 2 * q + 1];
      const bf16 *first = turned + (one >> 16) * kPanelStep, *second = turned + (two >> 16) * kPanelStep;
      const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>((one & 0xffffu) | two << 16)));
      for (int half = 0; half < kHalves; ++half) {
        const __m512i a = _mm512_load_si512(first + half * 32), b = _mm512_load_si512(second + half * 32);
        const auto low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b));
        const auto high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b));
        sums[q][half][0] = _mm512_dpbf16_ps(sums[q][half][0], low, x);
        sums[q][half][1] = _mm512_dpbf16_ps(sums[q][half][1], high, x);
      }
    }
  // The unpack instructions put four of each eight values into `low` and the other four into `high`; the indices
  // `front` and `back` restore the order.
  const __m512i front = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i back = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  for (int half = 0; half < kHalves; ++half) {
    const __m512 low = _mm512_add_ps(sums[0][half][0], sums[1][half][0]);
    const __m512 high = _mm512_add_ps(sums[0][half][1], sums[1][half][1]);
    _mm512_store_ps(out + half * 32, _mm512_permutex2var_ps(low, front, high));
    _mm512_store_ps(out + half * 32 + kStrip, _mm512_permutex2var_ps(low, back, high));
  }
}

// Computes out [32, kPanelStep]: the product E of the dropped elements of up to 32 tokens, from `token` on, with `rows`
// rows of W.
inline void dropped_product(const TileForward& work, int64_t rows, int64_t token, const bf16* turned, float* out) {
  for (int64_t t = token; t < min_i64(work.tokens, token + 2 * kStrip); ++t) {
    const uint32_t* entries = work.rest.entries + work.rest.first[t];
    const int64_t count = work.rest.first[t + 1] - work.rest.first[t];
    (rows > 32 ? dropped_sums<2> : dropped_sums<1>)(entries, count, turned, out + (t - token) * kPanelStep);
  }
}

// Computes out[i] = grad · rows[i] for kCount rows; each result is a dot product of `depth` values. Each row is padded
// with zeros to a multiple of 32 values.
template <int kCount>
inline void dots(const bf16* grad, int64_t depth, const bf16* const* rows, float* out) {
  __m512 sums[kCount][2];
  for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
  const auto step = [&](int64_t d, int side) {
    const auto inside = first_bits(depth - d);
    const auto left = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(inside, grad + d));
    for (int i = 0; i < kCount; ++i)
      sums[i][side] = _mm512_dpbf16_ps(sums[i][side], left, reinterpret_cast<__m512bh>(_mm512_load_si512(rows[i] + d)));
  };
  int64_t d = 0;
  for (; d + kTileDepth < depth; d += 2 * kTileDepth) {
    step(d, 0);
    step(d + kTileDepth, 1);
  }
  if (d < depth) step(d, 0);
  for (int i = 0; i < kCount; ++i) out[i] = _mm512_reduce_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]));
}

// Sets the elements of a block of dX that dropout drops to dot products of dY and columns of W. columns: W's columns
// from `column` on, each padded with zeros to a multiple of 32 values.
inline void dropped_dots(const TileBackward& work, int64_t column, int64_t strip, const bf16* columns, Block* block) {
  const int64_t n = work.weight.rows, stride = tiles_of(n) * kTileDepth;
  const uint32_t inside = first_bits(min_i64(32, work.weight.columns - column));
  for (int64_t r = 0; r < min_i64(block->left * kStrip, work.tokens - strip * kStrip); ++r) {
    const int64_t token = strip * kStrip + r;
    const bf16* grad = work.given + token * n;
    float* to = block->part(static_cast<int>(r / kStrip), 0) + r % kStrip * kStrip;
    for (uint32_t left = ~work.keep[token * work.keep_words + column / 32] & inside; left != 0;) {
      constexpr int kMost = 4;
      const bf16* rows[kMost];
      float* at[kMost];
      float values[kMost];
      int count = 0;
      for (; left != 0 && count < kMost; left &= left - 1, ++count) {
        const int64_t k = __builtin_ctz(left);
        rows[count] = columns + k * stride;
        at[count] = to + k / kStrip * kStrip * kStrip + k % kStrip;
      }
      constexpr decltype(&dots<1>) kDots[] = {dots<1>, dots<2>, dots<3>, dots<4>};
      kDots[count - 1](grad, n, rows, values);
      for (int i = 0; i < count; ++i) *at[i] = values[i];
    }
  }
}

}  // namespace
}  // namespace peft_ext
