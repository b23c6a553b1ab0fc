// The NF4 kernels of nf4_kernels.h with AVX2.
//
// Quantize: bisection finds the codes of 8 values at a time, with pivots from register tables. Dequantize: the kernel
// computes and rounds the 16 products code * absmax of a block once, and then looks each element up. bfloat16 and
// float16 words are looked up in two tables of bytes (pshufb), and float32 values in two tables of eight values
// (vpermps), of which the code's high bit selects one. The elements have the same bits as if the product code * absmax
// were computed for each element alone.
#if defined(__x86_64__)
#include "cpu/target_avx2.h"
// The headers below must be included after the target pragma.
#include "cpu/simd_avx2.h"
#include "nf4/cpu/nf4_block.h"
#include "nf4/cpu/nf4_kernels.h"

namespace peft_ext {
namespace {

// The pivots of the bisection that finds a code. The next pivot of a lane depends on the leading bits of the lane's
// code, which the previous comparisons have found. A comparison gives -1 if true, so that the found bits form the
// number 0 or a negative number: entry 8 - i is the pivot for the number -i, and entry 0 is the pivot for 0. The
// comparison `!(pivot >= value)` is true for a NaN, so that a NaN counts as above all pivots.
struct Pivots {
  alignas(32) float values[3][8] = {};

  constexpr Pivots() {
    for (int step = 0; step < 3; ++step)
      for (int i = 0; i < 2 << step; ++i) values[step][(8 - i) % 8] = nf4_threshold((2 * i + 1) * (4 >> step) - 1);
  }
};
constexpr Pivots kPivots;

// Returns the codes of 8 scaled values, one per 32-bit lane.
inline __m256i encode8(__m256 scaled) {
  const auto above = [&](__m256 pivot) { return _mm256_castps_si256(_mm256_cmp_ps(pivot, scaled, _CMP_NGE_UQ)); };
  __m256i found = above(_mm256_set1_ps(nf4_threshold(7)));
  for (int step = 0; step < 3; ++step) {
    const __m256i next = above(_mm256_permutevar8x32_ps(_mm256_load_ps(kPivots.values[step]), found));
    found = _mm256_add_epi32(_mm256_add_epi32(found, found), next);
  }
  return _mm256_sub_epi32(_mm256_setzero_si256(), found);
}

// Packs 32 codes into 16 bytes. The first code of each pair becomes the high nibble of a byte.
inline void store_codes(uint8_t* packed, const __m256i* codes) {
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3]));
  // The pack instructions order groups of four bytes by 128-bit lanes: the lower halves of all vectors come first, then
  // the upper halves. The permutation puts the groups back in the order of the values.
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i words = _mm256_maddubs_epi16(ordered, _mm256_set1_epi16(1 << 8 | 16));
  const __m256i packs = _mm256_packus_epi16(words, words);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packs, 0b1000)));
}

template <typename T>
inline float largest_of(const T* in, int64_t blocksize) {
  // The magnitudes are compared by their bits without the sign, as integers. The bits of a NaN are greater than the
  // bits of infinity, so that the result is NaN if a value is NaN, as in torch.amax.
  const __m256i sign_free = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < blocksize; i += 8)
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(load8(in + i)), sign_free));
  int32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
  int32_t largest_bits = lanes[0];
  for (int i = 1; i < 8; ++i) largest_bits = lanes[i] > largest_bits ? lanes[i] : largest_bits;
  return bits_to_float(static_cast<uint32_t>(largest_bits));
}

template <typename T>
inline void encode(const T* in, int64_t blocksize, float inverse, uint8_t* packed) {
  for (int64_t i = 0; i < blocksize; i += 32) {
    __m256i codes[4];
    for (int v = 0; v < 4; ++v) codes[v] = encode8(_mm256_mul_ps(load8(in + i + 8 * v), _mm256_set1_ps(inverse)));
    store_codes(packed + i / 2, codes);
  }
}

// The low bytes and the high bytes of a block's 16 two-byte products, as pshufb tables that both 128-bit lanes contain.
struct BytePlanes {
  __m256i low, high;
};

inline BytePlanes byte_planes(__m128i first8, __m128i last8) {
  const __m128i low_bytes = _mm_set1_epi16(0xff);
  const __m128i low = _mm_packus_epi16(_mm_and_si128(first8, low_bytes), _mm_and_si128(last8, low_bytes));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first8, 8), _mm_srli_epi16(last8, 8));
  return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

// Looks up the bfloat16 or float16 products of the 32 codes in 16 bytes, and writes these 32 elements to `out`.
inline void expand_words(const uint8_t* packed, const BytePlanes& planes, void* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
  const __m128i odd = _mm_and_si128(bytes, nibble);
  const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  const __m256i low = _mm256_shuffle_epi8(planes.low, codes);
  const __m256i high = _mm256_shuffle_epi8(planes.high, codes);
  const __m256i first = _mm256_unpacklo_epi8(low, high);   // the elements 0 to 7 and 16 to 23 of the 32
  const __m256i second = _mm256_unpackhi_epi8(low, high);  // the elements 8 to 15 and 24 to 31 of the 32
  __m256i* to = static_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
  _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
}

// Returns the float32 products of the 8 codes in 4 bytes.
inline __m256 expand_floats(const uint8_t* packed, __m256 first8, __m256 last8) {
  int32_t four;
  memcpy(&four, packed, sizeof(four));
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  const __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
  const __m256 low = _mm256_permutevar8x32_ps(first8, index);
  const __m256 high = _mm256_permutevar8x32_ps(last8, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

// The 16 float32 products code * scale of a block, one for each of the 16 codes.
struct Products {
  __m256 first8, last8;

  explicit Products(float scale)
      : first8(_mm256_mul_ps(_mm256_loadu_ps(kNf4Code), _mm256_set1_ps(scale))),
        last8(_mm256_mul_ps(_mm256_loadu_ps(kNf4Code + 8), _mm256_set1_ps(scale))) {}
};

inline void expand(const uint8_t* packed, float scale, int64_t count, float* out) {
  const Products products(scale);
  for (int64_t i = 0; i < count; i += 8)
    _mm256_storeu_ps(out + i, expand_floats(packed + i / 2, products.first8, products.last8));
}
inline void expand(const uint8_t* packed, float scale, int64_t count, bf16* out) {
  const Products products(scale);
  const BytePlanes planes = byte_planes(round_bf16(products.first8), round_bf16(products.last8));
  for (int64_t i = 0; i < count; i += 32) expand_words(packed + i / 2, planes, out + i);
}
inline void expand(const uint8_t* packed, float scale, int64_t count, f16* out) {
  const Products products(scale);
  const BytePlanes planes = byte_planes(round_f16(products.first8), round_f16(products.last8));
  for (int64_t i = 0; i < count; i += 32) expand_words(packed + i / 2, planes, out + i);
}

void decode_scales(const Nf4Scales& scales, int64_t begin, int64_t end, float* out) {
  const __m256 offset = _mm256_set1_ps(scales.offset);
  int64_t i = begin;
  while (i < end) {
    const int64_t stop = min_i64((i / kNestedBlock + 1) * kNestedBlock, end);
    const __m256 group = _mm256_set1_ps(scales.absmax[i / kNestedBlock]);
    for (; i + 8 <= stop; i += 8) {
      const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales.codes + i)));
      const __m256 product = _mm256_mul_ps(_mm256_i32gather_ps(scales.code, index, 4), group);
      _mm256_storeu_ps(out + (i - begin), _mm256_add_ps(product, offset));
    }
    for (; i < stop; ++i) out[i - begin] = decode_scale(scales, i);
  }
}

struct Table {
  __m256 first8, last8;
};

inline __m256 rounded(__m256 value, DType dtype) {
  if (dtype == DType::kBF16)
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(round_bf16(value)), 16));
  return dtype == DType::kF16 ? _mm256_cvtph_ps(round_f16(value)) : value;
}

inline Table make_table(float absmax, DType dtype) {
  const Products products(absmax);
  return {rounded(products.first8, dtype), rounded(products.last8, dtype)};
}

inline void decode(const uint8_t* packed, const Table& table, Vec* w) {
  for (int v = 0; v < 8; ++v) w[v].v = expand_floats(packed + 4 * v, table.first8, table.last8);
}

}  // namespace
}  // namespace peft_ext

#include "nf4/cpu/nf4_blocks_impl.h"
#include "nf4/cpu/nf4_skinny_impl.h"

namespace peft_ext {

const Nf4Kernels kNf4KernelsAvx2 = {quantize, dequantize, skinny, 8, decode_scales};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
