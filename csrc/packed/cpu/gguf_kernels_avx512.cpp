// The kernels of few_tokens_kernels.h for the quantized types of GGUF files, with AVX512-BF16. Each step of a kernel
// reads one or more blocks of codes, together with their scales. See row_products_avx512.h for the steps, and
// weight/formats/gguf_blocks.h for the blocks.
#if defined(__x86_64__)
#include "cpu/target_avx512bf16.h"
// The headers below must be included after the target pragma.
#include <immintrin.h>

#include "packed/cpu/row_products_avx512.h"
#include "weight/formats/list.h"

namespace peft_ext {
namespace {

template <typename Block>
struct GgufStep : OneRowStep {
  static bool accepts(const PackedView&) { return true; }
  static int64_t row_bytes(const PackedView& w) { return w.columns / Block::kColumns * Block::kBytes; }
  void open(const PackedView& w, int64_t row) { row_ = static_cast<const uint8_t*>(w.part[0]) + row * row_bytes(w); }
  const uint8_t* bytes(int64_t column) const { return row_ + column / Block::kColumns * Block::kBytes; }

 private:
  const uint8_t* row_;
};

// --- Blocks of 32 columns --------------------------------------------------------------------------------------------

// The bytes of kBlocks blocks as words of 16 bits, in two registers.
template <typename Block, int kBlocks>
struct BlockWords {
  static constexpr int kWords = Block::kBytes / 2, kAll = kWords * kBlocks;
  static_assert(Block::kBytes % 2 == 0 && kAll >= 32 && kAll <= 64, "two registers hold all words");
  __m512i first, last;  // the first 32 and the last 32 words of the blocks

  // Reads `blocks` blocks, and sets the words of the missing blocks to zero.
  BlockWords(const uint8_t* from, int blocks) {
    const uint8_t* from_last = from + 2 * (kAll - 32);
    if (blocks >= kBlocks) {
      first = _mm512_loadu_si512(from);
      last = _mm512_loadu_si512(from_last);
      return;
    }
    const int count = blocks * kWords, count_last = count - (kAll - 32);
    first = _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, from);
    last = _mm512_maskz_loadu_epi16(count_last <= 0 ? 0u : (1u << count_last) - 1, from_last);
  }
  __m512i pick(const Words& words) const { return _mm512_permutex2var_epi16(first, words.load(), last); }

  // Returns the argument of `pick` for which word i of the result of `pick` is word word_of(i) of the blocks.
  template <typename WordOf>
  static constexpr Words picked(const WordOf& word_of) {
    return words_of_each([&](int i) { return word_of(i) < 32 ? word_of(i) : word_of(i) + 64 - kAll; });
  }
};

// Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL: a step reads four blocks, each with 16 bytes of codes.
template <typename Block, typename Number, int kBits>
struct SmallBlockStep : GgufStep<Block> {
  static constexpr int kColumns = 128, kParts = 4, kBytes = 4 * Block::kBytes;
  static constexpr AddsAt kAdds = Block::kOffset ? AddsAt::kInStep : AddsAt::kNone;
  struct Held {
    __m512i words, fifth[2];  // the fifth bits of the columns 0 to 15, and 16 to 31, of each block
    __m512 scale, add;
  };
  static int column_of(int reg, int word) { return halves_column(reg, word); }

  Held load(int64_t j, int blocks) const {
    using Of = BlockWords<Block, 4>;
    constexpr int kWords = Block::kBytes / 2;
    constexpr Words kCodes = Of::picked([](int i) { return i / 8 * kWords + Block::kCodes / 2 + i % 8; });
    // Words 0 to 15 of kScales pick the scale for each of 16 lanes, and words 16 to 31 pick the offsets of the four
    // blocks, four times.
    constexpr Words kScales = Of::picked([](int i) { return i < 16 ? i / 4 * kWords : i % 4 * kWords + 1; });
    const Of words(this->bytes(j), blocks);
    Held held;
    held.words = words.pick(kCodes);
    const __m512i scales = words.pick(kScales);
    held.scale = _mm512_cvtph_ps(_mm512_castsi512_si256(scales));
    if constexpr (Block::kOffset) held.add = _mm512_zextps128_ps512(_mm_cvtph_ps(_mm512_extracti32x4_epi32(scales, 2)));
    if constexpr (kBits == 5) {
      constexpr Words kFifth[2] = {Of::picked([](int i) { return i / 8 * kWords + Block::kFifthBits / 2; }),
                                   Of::picked([](int i) { return i / 8 * kWords + Block::kFifthBits / 2 + 1; })};
      for (int half = 0; half < 2; ++half) held.fifth[half] = words.pick(kFifth[half]);
    }
    return held;
  }
  static __m512bh numbers(const Held& held, int, int part) {
    static constexpr Words kNumbers = nibble_numbers([](int code) { return Number::value(code); });
    if constexpr (kBits == 4) {
      return looked_up(at_nibble(held.words, part), kNumbers);
    } else {
      // In the word of fifth bits, bit 2 i and bit 2 i + 1 belong to the two bytes of word i of the codes.
      static constexpr Words kLarge = nibble_numbers([](int code) { return Number::value(code + 16); });
      static constexpr Words kBit[2] = {words_of_each([](int i) { return 1 << i % 8 * 2; }),
                                        words_of_each([](int i) { return 2 << i % 8 * 2; })};
      const __mmask32 large = _mm512_test_epi16_mask(held.fifth[part % 2], kBit[part / 2].load());
      const __m512i index = at_nibble(held.words, part);
      const __m512i low = _mm512_permutexvar_epi16(index, kNumbers.load());
      return reinterpret_cast<__m512bh>(_mm512_mask_permutexvar_epi16(low, large, index, kLarge.load()));
    }
  }
  static __m512 scale(const Held& held, int, int) { return held.scale; }
  static __m512 step_addends(const Held& held) { return held.add; }
};

// Q8_0: a step reads two blocks, each with 32 bytes of codes. Registers 0 and 1 of x hold the even and the odd columns.
// A code is the sum of the numbers that the two nibbles of its byte stand for.
struct Q8_0Step : GgufStep<BlockQ8_0> {
  static constexpr int kColumns = 64, kParts = 4, kBytes = 2 * BlockQ8_0::kBytes;
  static constexpr int register_of(int part) { return part / 2; }
  static int column_of(int reg, int word) { return 2 * word + reg; }
  struct Held {
    __m512i words;
    __m512 scale;
  };
  Held load(int64_t j, int blocks) const {
    using Of = BlockWords<BlockQ8_0, 2>;
    constexpr Words kCodes = Of::picked([](int i) { return i / 16 * 17 + 1 + i % 16; });
    constexpr Words kScales = words_of_each([](int i) { return i < 16 ? i / 8 * 17 : 0; });
    const Of words(bytes(j), blocks);
    return {words.pick(kCodes),
            _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(kScales.load(), words.first)))};
  }
  static __m512bh numbers(const Held& held, int, int part) {
    return looked_up(at_nibble(held.words, part), part % 2 ? kSignedHighNibbles : kLowNibbles);
  }
  static __m512 scale(const Held& held, int, int) { return held.scale; }
};

// --- Blocks of 256 columns -------------------------------------------------------------------------------------------

inline uint32_t u32_at(const uint8_t* bytes) {
  uint32_t word;
  memcpy(&word, bytes, sizeof(word));
  return word;
}

inline __m512 half_at(const uint8_t* bytes) {
  return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(gguf_u16(bytes))));
}

// Returns the 32 bytes from `bytes` on in both halves of a register.
inline __m512i twice(const uint8_t* bytes) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
}

// Returns `words`, each shifted so that bit `from` becomes bit `to`.
inline __m512i moved(__m512i words, int from, int to) {
  return from == to ? words : from < to ? _mm512_slli_epi16(words, to - from) : _mm512_srli_epi16(words, from - to);
}

// Returns the bits of `bits` where `mask` is set, and the bits of `words` elsewhere; `mask` is equal for all words.
inline __m512i with_bits(__m512i words, __m512i bits, int16_t mask) {
  return _mm512_ternarylogic_epi32(words, bits, _mm512_set1_epi16(mask), 0xD8);
}

// Q4_K, Q5_K: each of the two phases of a step (row_products_avx512.h) reads 64 bytes of codes. Each half of these 64
// bytes holds 64 columns: the first 32 in the low nibbles, the last 32 in the high nibbles.
template <typename Block, int kBits>
struct LargeBlockStep : GgufStep<Block> {
  static constexpr int kColumns = 128, kPhases = 2, kParts = 4, kSums = 2, kBytes = Block::kBytes;
  static constexpr AddsAt kAdds = AddsAt::kInStep;
  static constexpr int sum_of(int part) { return part % 2; }
  static int column_of(int reg, int word) { return word / 16 * 64 + reg % 2 * 32 + word % 16 * 2 + reg / 2; }
  struct Held {
    __m512i words[2], high;
    __m512 scale, add;
  };

  Held load(int64_t j, int) const {
    const uint8_t* b = this->bytes(j);
    Held held;
    for (int phase = 0; phase < 2; ++phase) held.words[phase] = _mm512_loadu_si512(b + Block::kCodes + 64 * phase);
    if constexpr (kBits == 5) held.high = twice(b + Block::kFifthBits);
    // Each byte of `scales` and `minima` is gguf_k_scale or gguf_k_minimum of one of the eight groups of 32 columns.
    const uint32_t a = u32_at(b + 4), m = u32_at(b + 8), c = u32_at(b + 12);
    const uint64_t scales = (a & 0x3f3f3f3f) | static_cast<uint64_t>((c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)) << 32;
    const uint64_t minima = (m & 0x3f3f3f3f) | static_cast<uint64_t>((c >> 4 & 0x0f0f0f0f) | (m >> 2 & 0x30303030))
                                                   << 32;
    const __m512 both = _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_set_epi64x(static_cast<int64_t>(minima), static_cast<int64_t>(scales))));
    const __m128 halves = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(u32_at(b))));
    const __m256 d = _mm256_broadcastss_ps(halves), dmin = _mm256_broadcastss_ps(_mm_movehdup_ps(halves));
    held.scale = _mm512_zextps256_ps512(_mm256_mul_ps(d, _mm512_castps512_ps256(both)));
    held.add = _mm512_zextps256_ps512(_mm256_fnmadd_ps(dmin, _mm512_extractf32x8_ps(both, 1), _mm256_setzero_ps()));
    return held;
  }
  static __m512bh numbers(const Held& held, int phase, int part) {
    const __m512i words = at_nibble(held.words[phase], part);
    if constexpr (kBits == 4) {
      return looked_up(words, kLowNibbles);
    } else {
      // Bit 4 * phase + 2 * (word / 16) + part % 2 of a byte of `high` is the fifth bit of the code.
      static constexpr Words kCodes = words_of_each([](int code) { return bf16_bits(code); });
      static constexpr Words kBits2[2] = {words_of_each([](int word) { return word / 16 * 2; }),
                                          words_of_each([](int word) { return 4 + word / 16 * 2; })};
      const __m512i bits = _mm512_srlv_epi16(held.high, kBits2[phase].load());
      return looked_up(with_bits(words, moved(bits, part / 2 * 8 + part % 2, 4), 0x10), kCodes);
    }
  }
  static __m512 scale(const Held& held, int phase, int sum) {
    static constexpr Lanes kRun[2][2] = {{lanes_of_each([](int lane) { return lane / 8 * 2; }),
                                          lanes_of_each([](int lane) { return lane / 8 * 2 + 1; })},
                                         {lanes_of_each([](int lane) { return 4 + lane / 8 * 2; }),
                                          lanes_of_each([](int lane) { return 4 + lane / 8 * 2 + 1; })}};
    return spread(kRun[phase][sum], held.scale);
  }
  static __m512 step_addends(const Held& held) { return held.add; }
};

// Q6_K: each of the two phases of a step (row_products_avx512.h) reads 64 bytes of low nibbles, of which each half
// holds 64 columns. The two high bits of the codes of 128 columns are in 32 bytes.
struct Q6_KStep : GgufStep<BlockQ6_K> {
  static constexpr int kColumns = 128, kPhases = 2, kParts = 4, kSums = 2, kBytes = BlockQ6_K::kBytes;
  static constexpr int sum_of(int part) { return part % 2; }
  static int column_of(int reg, int word) { return word / 16 * 32 + reg % 2 * 64 + word % 16 * 2 + reg / 2; }
  struct Held {
    __m512i words[2], high[2];
    __m512 scale;
  };
  Held load(int64_t j, int) const {
    const uint8_t* b = bytes(j);
    static constexpr Words kHalf = words_of_each([](int word) { return word / 16 * 2; });
    Held held;
    for (int phase = 0; phase < 2; ++phase) {
      held.words[phase] = _mm512_loadu_si512(b + 64 * phase);
      held.high[phase] = _mm512_srlv_epi16(twice(b + 128 + 32 * phase), kHalf.load());
    }
    const __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 192));
    held.scale = _mm512_mul_ps(half_at(b + 208), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scales)));
    return held;
  }
  static __m512bh numbers(const Held& held, int phase, int part) {
    static constexpr Words kSmall = words_of_each([](int code) { return bf16_bits(code - 32); });
    static constexpr Words kLarge = words_of_each([](int code) { return bf16_bits(code); });
    // vpermi2w reads six bits of an index, so that its two tables hold the numbers of all 64 codes.
    const __m512i index =
        with_bits(at_nibble(held.words[phase], part), moved(held.high[phase], part / 2 * 8 + part % 2 * 4, 4), 0x30);
    return reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(kSmall.load(), index, kLarge.load()));
  }
  static __m512 scale(const Held& held, int phase, int sum) {
    static constexpr Lanes kGroup[2][2] = {
        {lanes_of_each([](int lane) { return lane / 4; }), lanes_of_each([](int lane) { return 4 + lane / 4; })},
        {lanes_of_each([](int lane) { return 8 + lane / 4; }), lanes_of_each([](int lane) { return 12 + lane / 4; })}};
    return spread(kGroup[phase][sum], held.scale);
  }
};

// IQ4_XS: each of the two phases of a step (row_products_avx512.h) reads 64 bytes of codes, which have the layout of
// the codes of four Q4_0 blocks.
struct IQ4_XSStep : GgufStep<BlockIQ4_XS> {
  static constexpr int kColumns = 128, kPhases = 2, kParts = 4, kBytes = BlockIQ4_XS::kBytes;
  static int column_of(int reg, int word) { return halves_column(reg, word); }
  struct Held {
    __m512i words[2];
    __m512 scale;
  };
  Held load(int64_t j, int) const {
    const uint8_t* b = bytes(j);
    Held held;
    for (int phase = 0; phase < 2; ++phase)
      held.words[phase] = _mm512_loadu_si512(b + BlockIQ4_XS::kCodes + 64 * phase);
    const __m256i run = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low =
        _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(u32_at(b + 4))), _mm256_slli_epi32(run, 2));
    const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(gguf_u16(b + 2)), _mm256_slli_epi32(run, 1));
    const __m256i scales = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
                                           _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4));
    const __m256 numbers = _mm256_cvtepi32_ps(_mm256_sub_epi32(scales, _mm256_set1_epi32(32)));
    held.scale = _mm512_mul_ps(half_at(b), _mm512_zextps256_ps512(numbers));
    return held;
  }
  static __m512bh numbers(const Held& held, int phase, int part) {
    static constexpr Words kNumbers = nibble_numbers([](int code) { return GgufIQ4Table::value(code); });
    return looked_up(at_nibble(held.words[phase], part), kNumbers);
  }
  static __m512 scale(const Held& held, int phase, int) {
    static constexpr Lanes kRun[2] = {lanes_of_each([](int lane) { return lane / 4; }),
                                      lanes_of_each([](int lane) { return 4 + lane / 4; })};
    return spread(kRun[phase], held.scale);
  }
};

// Q2_K, Q3_K: a step reads 64 bytes with codes of two bits. A nibble holds the codes of two columns, whose numbers are
// looked up in two tables. Sum f is the sum over the codes in bits 2 f and 2 f + 1 of the bytes.
template <typename Block>
struct FieldStep : GgufStep<Block> {
  static constexpr int kColumns = 256, kParts = 8, kSums = 4, kBytes = Block::kBytes;
  static constexpr int sum_of(int part) { return part / 2 % 2 * 2 + part % 2; }
  static int column_of(int reg, int word) { return word / 16 * 128 + sum_of(reg) * 32 + word % 16 * 2 + reg / 4; }
  struct Held {
    __m512i words, high;
    __m512 scale, add;
  };
  static __m512 scale(const Held& held, int, int sum) {
    static constexpr Lanes kGroup[4] = {lanes_of_each([](int lane) { return lane / 8 * 8 + lane % 8 / 4; }),
                                        lanes_of_each([](int lane) { return lane / 8 * 8 + lane % 8 / 4 + 2; }),
                                        lanes_of_each([](int lane) { return lane / 8 * 8 + lane % 8 / 4 + 4; }),
                                        lanes_of_each([](int lane) { return lane / 8 * 8 + lane % 8 / 4 + 6; })};
    return spread(kGroup[sum], held.scale);
  }
};

struct Q2_KStep : FieldStep<BlockQ2_K> {
  static constexpr AddsAt kAdds = AddsAt::kInStep;
  static constexpr int kAddColumns = 16;
  Held load(int64_t j, int) const {
    const uint8_t* b = bytes(j);
    Held held;
    held.words = _mm512_loadu_si512(b + 16);
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
    const __m512 scales = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
    held.scale = _mm512_mul_ps(half_at(b + 80), scales);
    held.add = _mm512_fnmadd_ps(half_at(b + 82), _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4)), _mm512_setzero_ps());
    return held;
  }
  static __m512bh numbers(const Held& held, int, int part) {
    static constexpr Words kLow = nibble_numbers([](int fields) { return fields & 3; });
    static constexpr Words kHigh = nibble_numbers([](int fields) { return fields >> 2; });
    return looked_up(at_nibble(held.words, part / 2), part % 2 ? kHigh : kLow);
  }
  static __m512 step_addends(const Held& held) { return held.add; }
};

struct Q3_KStep : FieldStep<BlockQ3_K> {
  Held load(int64_t j, int) const {
    const uint8_t* b = bytes(j);
    static constexpr Words kHalf = words_of_each([](int word) { return word / 16 * 4; });
    Held held;
    held.words = _mm512_loadu_si512(b + 32);
    held.high = _mm512_srlv_epi16(twice(b), kHalf.load());
    // See BlockQ3_K::scale.
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 94));
    const __m128i low_bytes = _mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9);
    const __m128i high_bytes = _mm_setr_epi8(10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13);
    const __m512i group = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(packed, low_bytes)),
                                          _mm512_slli_epi32(_mm512_srli_epi32(group, 3), 2));
    const __m512i high = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(packed, high_bytes)),
                                           _mm512_slli_epi32(_mm512_srli_epi32(group, 2), 1));
    const __m512i scales = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(15)),
                                           _mm512_slli_epi32(_mm512_and_si512(high, _mm512_set1_epi32(3)), 4));
    held.scale = _mm512_mul_ps(half_at(b + 108), _mm512_cvtepi32_ps(_mm512_sub_epi32(scales, _mm512_set1_epi32(32))));
    return held;
  }
  static __m512bh numbers(const Held& held, int, int part) {
    static constexpr Words kLow = words_of_each([](int code) { return bf16_bits((code & 3) + code / 16 * 4 - 4); });
    static constexpr Words kHigh = words_of_each([](int code) { return bf16_bits(code / 4 % 4 + code / 16 * 4 - 4); });
    const __m512i third = moved(held.high, part / 4 * 8 + sum_of(part), 4);
    return looked_up(with_bits(at_nibble(held.words, part / 2), third, 0x10), part % 2 ? kHigh : kLow);
  }
};

}  // namespace

FewTokensKernels gguf_kernels_avx512_bf16(int number, const PackedView& w) {
  switch (number) {
    case 66:
      return first_of<SmallBlockStep<BlockQ4_0, GgufMinus<8>, 4>>(w);
    case 67:
      return first_of<SmallBlockStep<BlockQ4_1, GgufMinus<0>, 4>>(w);
    case 70:
      return first_of<SmallBlockStep<BlockQ5_0, GgufMinus<16>, 5>>(w);
    case 71:
      return first_of<SmallBlockStep<BlockQ5_1, GgufMinus<0>, 5>>(w);
    case 72:
      return first_of<Q8_0Step>(w);
    case 74:
      return first_of<Q2_KStep>(w);
    case 75:
      return first_of<Q3_KStep>(w);
    case 76:
      return first_of<LargeBlockStep<BlockQ4_K, 4>>(w);
    case 77:
      return first_of<LargeBlockStep<BlockQ5_K, 5>>(w);
    case 78:
      return first_of<Q6_KStep>(w);
    case 84:
      return first_of<SmallBlockStep<BlockIQ4_NL, GgufIQ4Table, 4>>(w);
    case 87:
      return first_of<IQ4_XSStep>(w);
    default:
      return {};
  }
}

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
