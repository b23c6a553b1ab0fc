// The NF4 kernels of nf4_kernels.h except `skinny`, in plain C++, for any CPU.
#include "nf4/cpu/nf4_block.h"
#include "nf4/cpu/nf4_kernels.h"

namespace peft_ext {
namespace {

template <typename T>
inline float largest_of(const T* in, int64_t blocksize) {
  return block_absmax(in, blocksize);
}

template <typename T>
inline void encode(const T* in, int64_t blocksize, float inverse, uint8_t* packed) {
  encode_block(in, blocksize, [&](float value) { return value * inverse; }, packed);
}

template <typename T>
inline void expand(const uint8_t* packed, float scale, int64_t count, T* out) {
  dequantize_block(packed, scale, 0, count, out);
}

void decode_scales(const Nf4Scales& scales, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) out[i - begin] = decode_scale(scales, i);
}

}  // namespace
}  // namespace peft_ext

#include "nf4/cpu/nf4_blocks_impl.h"

namespace peft_ext {

const Nf4Kernels kNf4KernelsScalar = {quantize, dequantize, nullptr, 0, decode_scales};

}  // namespace peft_ext
