// The NF4 kernels of nf4_kernels.h with NEON.
//
// Quantize: the kernel counts the thresholds below each of 16 values at a time. Dequantize: the kernel computes and
// rounds the 16 products code * absmax of a block once, and looks each product up by bytes (tbl): two tables of bytes
// for a 16-bit word, four for a float. Interleaving stores join the looked-up bytes to words or floats. The elements
// have the same bits as if the product code * absmax were computed for each element alone.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "nf4/cpu/nf4_block.h"
#include "nf4/cpu/nf4_codes_neon.h"
#include "nf4/cpu/nf4_kernels.h"

namespace peft_ext {
namespace {

// Returns the codes of four scaled values. A comparison gives -1 in each lane in which the comparison is true. For a
// NaN no comparison is true, so that a NaN has code 15.
inline uint32x4_t encode4(float32x4_t scaled) {
  uint32x4_t code = vdupq_n_u32(15);
  for (int i = 0; i < 15; ++i) code = vaddq_u32(code, vcgeq_f32(vdupq_n_f32(nf4_threshold(i)), scaled));
  return code;
}

template <typename T>
inline float largest_of(const T* in, int64_t blocksize) {
  // The magnitudes are compared by their bits without the sign, as integers. The bits of a NaN are greater than the
  // bits of infinity, so that the result is NaN if a value is NaN, as in torch.amax.
  const uint32x4_t sign_free = vdupq_n_u32(0x7fffffff);
  uint32x4_t most = vdupq_n_u32(0);
  for (int64_t i = 0; i < blocksize; i += 4)
    most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(load4(in + i)), sign_free));
  return bits_to_float(vmaxvq_u32(most));
}

template <typename T>
inline void encode(const T* in, int64_t blocksize, float inverse, uint8_t* packed) {
  const auto codes4 = [&](int64_t i) { return vmovn_u32(encode4(vmulq_n_f32(load4(in + i), inverse))); };
  for (int64_t i = 0; i < blocksize; i += 16) {
    const uint8x8_t first = vmovn_u16(vcombine_u16(codes4(i), codes4(i + 4)));
    const uint8x8_t last = vmovn_u16(vcombine_u16(codes4(i + 8), codes4(i + 12)));
    vst1_u8(packed + i / 2, vsli_n_u8(vuzp2_u8(first, last), vuzp1_u8(first, last), 4));
  }
}

// Looks up the values of 16 codes, and stores these values, 16-bit words or floats, to memory in the order of the
// codes.
inline void store_looked_up(uint8x16_t index, const WordPlanes& planes, uint8_t* out) {
  const uint8x16x2_t bytes = {{vqtbl1q_u8(planes.val[0], index), vqtbl1q_u8(planes.val[1], index)}};
  vst2q_u8(out, bytes);
}
inline void store_looked_up(uint8x16_t index, const FloatPlanes& planes, uint8_t* out) {
  uint8x16x4_t bytes;
  for (int i = 0; i < 4; ++i) bytes.val[i] = vqtbl1q_u8(planes.val[i], index);
  vst4q_u8(out, bytes);
}

template <typename T>
inline void expand(const uint8_t* packed, float scale, int64_t count, T* out) {
  T products[16];
  for (int i = 0; i < 16; i += 4) store4(products + i, vmulq_n_f32(vld1q_f32(kNf4Code + i), scale));
  const auto planes = planes_of(products);
  for (int64_t i = 0; i < count; i += 32) {
    const Nibbles codes = nibbles(packed + i / 2);
    store_looked_up(vzip1q_u8(codes.even, codes.odd), planes, reinterpret_cast<uint8_t*>(out + i));
    store_looked_up(vzip2q_u8(codes.even, codes.odd), planes, reinterpret_cast<uint8_t*>(out + i + 16));
  }
}

// A tbl instruction looks up bytes in a table of 64 bytes at most, a quarter of the 256 table entries, so that a
// portable loop is as fast.
void decode_scales(const Nf4Scales& scales, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) out[i - begin] = decode_scale(scales, i);
}

using Table = FloatPlanes;

inline Table make_table(float absmax, DType dtype) {
  float products[16];
  for (int i = 0; i < 16; i += 4) {
    const Vec product{vmulq_n_f32(vld1q_f32(kNf4Code + i), absmax)};
    (dtype == DType::kBF16  ? product.rounded<bf16>()
     : dtype == DType::kF16 ? product.rounded<f16>()
                            : product)
        .store(products + i);
  }
  return planes_of(products);
}

inline void decode(const uint8_t* packed, const Table& table, Vec* w) {
  for (int v = 0; v < 16; v += 8) {
    const Nibbles codes = nibbles(packed + 2 * v);
    for (int half = 0; half < 2; ++half) {
      const uint8x16_t index = half == 0 ? vzip1q_u8(codes.even, codes.odd) : vzip2q_u8(codes.even, codes.odd);
      uint8x16_t bytes[4];
      for (int i = 0; i < 4; ++i) bytes[i] = vqtbl1q_u8(table.val[i], index);
      const auto words = [](uint8x16_t pair) { return vreinterpretq_u16_u8(pair); };
      const auto floats = [](uint16x8_t quad) { return Vec{vreinterpretq_f32_u16(quad)}; };
      const uint16x8_t low[2] = {words(vzip1q_u8(bytes[0], bytes[1])), words(vzip2q_u8(bytes[0], bytes[1]))};
      const uint16x8_t high[2] = {words(vzip1q_u8(bytes[2], bytes[3])), words(vzip2q_u8(bytes[2], bytes[3]))};
      for (int i = 0; i < 2; ++i) {
        w[v + 4 * half + 2 * i] = floats(vzip1q_u16(low[i], high[i]));
        w[v + 4 * half + 2 * i + 1] = floats(vzip2q_u16(low[i], high[i]));
      }
    }
  }
}

}  // namespace
}  // namespace peft_ext

#include "nf4/cpu/nf4_blocks_impl.h"
#include "nf4/cpu/nf4_skinny_impl.h"

namespace peft_ext {

const Nf4Kernels kNf4KernelsNeon = {quantize, dequantize, skinny, 8, decode_scales};

}  // namespace peft_ext
#endif
