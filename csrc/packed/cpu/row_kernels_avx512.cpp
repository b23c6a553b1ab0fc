// The kernels of few_tokens_kernels.h for FP4, MXFP4 (also GGUF's), NVFP4, FP8, integers in rows and HQQ, with
// AVX512-BF16. See row_products_avx512.h for the steps.
#if defined(__x86_64__)
#include "cpu/target_avx512bf16.h"
// The headers below must be included after the target pragma.
#include <immintrin.h>

#include "packed/cpu/format_traits.h"
#include "packed/cpu/row_products_avx512.h"
#include "packed/cpu/row_scales_avx512.h"
#include "weight/formats/list.h"

namespace peft_ext {
namespace {

// kHighNibbles is a table of the numbers of the high nibble of an 8-bit code: code - 128 is this number plus the low
// nibble. kMiddleNibbles is a table of code - 8 for the codes of 4 bits.
constexpr Words kHighNibbles = nibble_numbers([](int code) { return 16 * (code - 8); });
constexpr Words kMiddleNibbles = nibble_numbers([](int code) { return code - 8; });

// Returns 64 bytes of codes of a row. If `blocks` is 1, the row has only 32 bytes from `codes` on, and the other 32
// bytes of the result are 0.
inline __m512i load_bytes(const uint8_t* codes, int blocks) {
  return blocks >= 2 ? _mm512_loadu_si512(codes)
                     : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}

constexpr Lanes kTwoBlocks = lanes_of_each([](int lane) { return lane / 8; });
constexpr Lanes kFourBlocks = lanes_of_each([](int lane) { return lane / 4; });
constexpr Lanes kEightBlocks = lanes_of_each([](int lane) { return lane / 2; });

// --- Codes of 4 bits -------------------------------------------------------------------------------------------------

// The steps (row_products_avx512.h) of 4-bit codes: 64 bytes hold 128 columns in 32 words of four codes.
template <Nibbles kNibbles>
struct NibbleStep : OneRowStep {
  static constexpr int kColumns = 128, kParts = 4, kBytes = 64;
  struct Held {
    __m512i words;
    __m512 scale;
  };
  static int column_of(int reg, int word) {
    switch (kNibbles) {
      case Nibbles::kLowFirst:
        return 4 * word + reg;
      case Nibbles::kHighFirst:
        return 4 * word + (reg ^ 1);
      default:
        return halves_column(reg, word);
    }
  }
  __m512 scale(const Held& held, int, int) const { return held.scale; }
};

// The step of the formats whose values are table16()[code] * scale, see weight/formats/list.h.
template <typename F>
struct TableStep : NibbleStep<F::kNibbles> {
  using Held = typename NibbleStep<F::kNibbles>::Held;
  static constexpr int kTogether = F::kScaleColumns;
  static bool accepts(const PackedView& w) { return F::has_nibbles(w) && w.columns % 32 == 0; }
  void open(const PackedView& w, int64_t row) {
    view_ = &w;
    row_ = row;
    const __m512 entries = _mm512_loadu_ps(F::table16());
    table_ = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(entries, entries));
  }
  static int64_t row_bytes(const PackedView& w) { return F::codes32(w, 1, 0) - F::codes32(w, 0, 0); }
  const uint8_t* bytes(int64_t column) const { return F::codes32(*view_, row_, column); }
  void enter(int64_t start, int64_t stop) {
    start_ = start;
    const int64_t count = (stop - start) / kTogether;
    F::scales(*view_, row_, start, count, scale_);
    for (int64_t i = count; i < count + 8; ++i) scale_[i] = 0.0f;
  }
  Held load(int64_t j, int blocks) const {
    const int64_t at = (j - start_) / kTogether;
    if (kTogether == 16)
      return {codes(j, blocks), spread(kEightBlocks, _mm512_castps256_ps512(_mm256_loadu_ps(scale_ + at)))};
    return {codes(j, blocks), spread(kFourBlocks, _mm512_castps128_ps512(_mm_loadu_ps(scale_ + at)))};
  }
  __m512bh numbers(const Held& held, int, int part) const {
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(at_nibble(held.words, part), table_));
  }

 private:
  __m512i codes(int64_t j, int blocks) const {
    if (F::kContiguous && blocks >= 4) return _mm512_loadu_si512(F::codes32(*view_, row_, j));
    const auto piece = [&](int i) {
      return i < blocks ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(F::codes32(*view_, row_, j + 32 * i)))
                        : _mm_setzero_si128();
    };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(0)), piece(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(2)), piece(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  const PackedView* view_;
  int64_t row_, start_;
  __m512i table_;
  alignas(64) float scale_[kChunkColumns / kTogether + 8];
};

// --- Integers in rows ------------------------------------------------------------------------------------------------

// Decodes the scales of IntRows, and, if kZeros, computes the addends (middle - zero) * scale. A step multiplies x with
// the difference of code and middle, where middle is 8 or 128, or 0 for signed codes.
template <bool kZeros>
struct IntRow {
  static bool accepts(const PackedView& w, int bits) {
    return code_bits(w.option) == bits && (w.part[2] != nullptr) == kZeros && w.columns % 32 == 0 &&
           one_group_in_32(w, w.part[3]);
  }
  void decode(const PackedView& w, int64_t row, int64_t start, int64_t stop) {
    const int64_t together = w.group ? w.group / 32 : w.columns / 32;
    const int64_t groups = groups_of(w), first = IntRows::has_one_scale(w) ? 0 : row * groups;
    const int bits = code_bits(w.option), codes = 32 / bits, mask = (1 << bits) - 1;
    const auto addends = [&](int64_t index, int64_t group, __mmask16 which) {
      if (IntRows::is_plain(w)) {
        const __m128i zeros = _mm_maskz_loadu_epi8(which, static_cast<const int8_t*>(w.part[2]) + index);
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_cvtepi8_epi32(zeros)));
      }
      const uint32_t* words = static_cast<const uint32_t*>(w.part[2]) + row / codes * groups + group;
      const __m512i shifted = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(which, words),
                                               _mm_cvtsi32_si128(static_cast<int>(row % codes) * bits));
      const __m512i zeros = _mm512_and_si512(shifted, _mm512_set1_epi32(mask));
      return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(1 << (bits - 1)), zeros));
    };
    decode_blocks<kZeros>(w.part[1], scale_type(w.option), first, together, start / 32, (stop - start) / 32, addends,
                          &blocks);
  }
  BlockScales blocks;
};

template <bool kZeros>
struct Int4Step : NibbleStep<Nibbles::kLowFirst> {
  static constexpr AddsAt kAdds = kZeros ? AddsAt::kInChunk : AddsAt::kNone;
  static bool accepts(const PackedView& w) { return IntRow<kZeros>::accepts(w, 4); }
  void open(const PackedView& w, int64_t row) {
    view_ = &w;
    row_ = row;
  }
  static int64_t row_bytes(const PackedView& w) { return w.columns / 2; }
  const uint8_t* bytes(int64_t column) const { return IntRows::codes32(*view_, row_, column); }
  void enter(int64_t start, int64_t stop) {
    start_ = start;
    row_scales_.decode(*view_, row_, start, stop);
  }
  Held load(int64_t j, int blocks) const {
    const uint8_t* from = bytes(j);
    const __m512 scale = _mm512_castps128_ps512(_mm_loadu_ps(row_scales_.blocks.scale + (j - start_) / 32));
    return {blocks >= 4 ? _mm512_loadu_si512(from)
                        : _mm512_maskz_loadu_epi64(static_cast<__mmask8>((1 << 2 * blocks) - 1), from),
            spread(kFourBlocks, scale)};
  }
  static __m512bh numbers(const Held& held, int, int part) {
    return looked_up(at_nibble(held.words, part), kMiddleNibbles);
  }
  const float* chunk_addends(int) const { return row_scales_.blocks.add; }

 private:
  const PackedView* view_;
  int64_t row_, start_;
  IntRow<kZeros> row_scales_;
};

// ByteStep: base of the steps of formats with one byte for each column, which read 64 bytes at a time. Registers 0 and
// 1 of x hold the even and the odd columns, and for each of these registers, two parts are the low and the high nibbles
// of the bytes (Fp8Step has one part for each register).
struct ByteStep : OneRowStep {
  static constexpr int kColumns = 64, kParts = 4, kBytes = 64;
  static constexpr int register_of(int part) { return part / 2; }
  static int column_of(int reg, int word) { return 2 * word + reg; }
  static int64_t row_bytes(const PackedView& w) { return w.columns; }
  void open(const PackedView& w, int64_t row) {
    view_ = &w;
    row_ = row;
  }
  const uint8_t* bytes(int64_t column) const {
    return static_cast<const uint8_t*>(view_->part[0]) + row_ * view_->columns + column;
  }

 protected:
  // Returns the scales of two blocks of 32 columns, the first in lanes 0 to 7 and the second in lanes 8 to 15.
  static __m512 two_blocks(const float* scales) {
    const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
    return spread(kTwoBlocks, _mm512_castps128_ps512(_mm_castsi128_ps(two)));
  }
  const PackedView* view_;
  int64_t row_, start_;
};

// Int8Step looks up a number for each nibble of an 8-bit code. The sum of a code's two numbers is the difference code -
// middle, see IntRow.
template <bool kZeros>
struct Int8Step : ByteStep {
  static constexpr AddsAt kAdds = kZeros ? AddsAt::kInChunk : AddsAt::kNone;
  struct Held {
    __m512i words;
    __m512 scale;
  };
  static bool accepts(const PackedView& w) { return IntRow<kZeros>::accepts(w, 8); }
  void open(const PackedView& w, int64_t row) {
    ByteStep::open(w, row);
    high_ = IntRows::is_plain(w) ? &kSignedHighNibbles : &kHighNibbles;
  }
  void enter(int64_t start, int64_t stop) {
    start_ = start;
    row_scales_.decode(*view_, row_, start, stop);
  }
  Held load(int64_t j, int blocks) const {
    return {load_bytes(bytes(j), blocks), two_blocks(row_scales_.blocks.scale + (j - start_) / 32)};
  }
  __m512bh numbers(const Held& held, int, int part) const {
    return looked_up(at_nibble(held.words, part), part % 2 ? *high_ : kLowNibbles);
  }
  static __m512 scale(const Held& held, int, int) { return held.scale; }
  const float* chunk_addends(int) const { return row_scales_.blocks.add; }

 private:
  const Words* high_;
  IntRow<kZeros> row_scales_;
};

// --- HQQ -------------------------------------------------------------------------------------------------------------

// HqqStep: 64 bytes hold 64 columns of two rows: the high nibbles belong to row n, the low nibbles to row n + N / 2.
// HqqStep does not round the difference code - zero; decoding an HQQ weight rounds the difference to the dtype of the
// scales.
struct HqqStep : ByteStep {
  static constexpr int kSums = 2, kOutputs = 2;
  static constexpr AddsAt kAdds = AddsAt::kInChunk;
  static constexpr int sum_of(int part) { return 1 - part % 2; }
  static int64_t units(const PackedView& w) { return w.rows / 2; }
  struct Held {
    __m512i words;
    __m512 scale[2];
  };
  static bool accepts(const PackedView& w) {
    return code_bits(w.option) == 4 && !Hqq::has_axis0(w) && w.rows % 2 == 0 && w.columns % 32 == 0 &&
           w.group % 32 == 0 && w.columns % w.group == 0;
  }
  void enter(int64_t start, int64_t stop) {
    start_ = start;
    const ScaleType type = scale_type(view_->option);
    const auto addends = [&](int64_t index, int64_t, __mmask16 which) {
      return _mm512_sub_ps(_mm512_setzero_ps(), scales16(view_->part[2], type, index, which));
    };
    for (int o = 0; o < 2; ++o)
      decode_blocks<true>(view_->part[1], type, (row_ + o * units(*view_)) * (view_->columns / view_->group),
                          view_->group / 32, start / 32, (stop - start) / 32, addends, &blocks_[o]);
  }
  Held load(int64_t j, int blocks) const {
    Held held;
    held.words = load_bytes(bytes(j), blocks);
    for (int o = 0; o < 2; ++o) held.scale[o] = two_blocks(blocks_[o].scale + (j - start_) / 32);
    return held;
  }
  static __m512bh numbers(const Held& held, int, int part) {
    return looked_up(at_nibble(held.words, part), kLowNibbles);
  }
  static __m512 scale(const Held& held, int, int sum) { return held.scale[sum]; }
  const float* chunk_addends(int output) const { return blocks_[output].add; }

 private:
  BlockScales blocks_[2];
};

// --- FP8 -------------------------------------------------------------------------------------------------------------

// The values of the 128 magnitudes of e4m3 codes, as bits of bfloat16. The value of a magnitude i < 8 is i * 2^-9.
struct E4m3Magnitudes {
  Words part[4];
  constexpr E4m3Magnitudes() : part{} {
    for (int i = 0; i < 128; ++i) {
      const int small = bf16_bits(i) - (i > 0 ? 9 << 7 : 0), normal = (i << 4) + (120 << 7);
      part[i / 32].of[i % 32] = static_cast<uint16_t>(i == 127 ? 0x7fc0 : i < 8 ? small : normal);
    }
  }
};
constexpr E4m3Magnitudes kE4m3Magnitudes;

// Fp8Step: part 0 has the codes of the even columns, which are multiplied with register 0 of x. Part 1 has the codes of
// the odd columns, which are multiplied with register 1 of x.
struct Fp8Step : ByteStep {
  static constexpr int kParts = 2;
  static constexpr int register_of(int part) { return part; }
  struct Held {
    __m512i words;
    __m512 scale;
  };
  static bool accepts(const PackedView& w) { return w.columns % 32 == 0 && Fp8::column_shift(w) >= 6; }
  void enter(int64_t start, int64_t stop) {
    start_ = start;
    const int shift = static_cast<int>(min_i64(Fp8::column_shift(*view_), 40));
    const int64_t first = (row_ >> Fp8::row_shift(*view_)) * Fp8::blocks(view_->columns, Fp8::column_shift(*view_));
    decode_blocks<false>(view_->part[1], scale_type(view_->option), first, int64_t{1} << (shift - 5), start / 32,
                         (stop - start) / 32, nullptr, &blocks_);
  }
  Held load(int64_t j, int blocks) const {
    return {load_bytes(bytes(j), blocks), _mm512_set1_ps(blocks_.scale[(j - start_) / 32])};
  }
  static __m512bh numbers(const Held& held, int, int part) {
    const __m512i index = part == 0 ? held.words : _mm512_srli_epi16(held.words, 8);
    const auto& table = kE4m3Magnitudes.part;
    const __mmask32 large = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    __m512i bits = _mm512_permutex2var_epi16(table[0].load(), index, table[1].load());
    bits = _mm512_mask_mov_epi16(bits, large, _mm512_permutex2var_epi16(table[2].load(), index, table[3].load()));
    const __m512i sign = part == 0 ? _mm512_slli_epi16(held.words, 8) : held.words;
    return reinterpret_cast<__m512bh>(  // the operand 0xF8 means: bits | (sign & 0x8000)
        _mm512_ternarylogic_epi32(bits, sign, _mm512_set1_epi16(-0x8000), 0xF8));
  }
  static __m512 scale(const Held& held, int, int) { return held.scale; }

 private:
  BlockScales blocks_;
};

}  // namespace

FewTokensKernels row_kernels_avx512_bf16(int number, const PackedView& w) {
  switch (number) {
    case 1:
      return first_of<TableStep<Fp4>>(w);
    case 2:
      return first_of<TableStep<Mxfp4>>(w);
    case 3:
      return first_of<TableStep<Nvfp4>>(w);
    case 4:
      return first_of<Fp8Step>(w);
    case 5:
      return first_of<Int4Step<false>, Int4Step<true>, Int8Step<false>, Int8Step<true>>(w);
    case 8:
      return first_of<HqqStep>(w);
    case 103:
      return first_of<TableStep<GgufMXFP4>>(w);
    default:
      return {};
  }
}

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
