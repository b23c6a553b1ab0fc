// NF4 on any CPU. See nf4_kernels.h for the contract.
#include "nf4/cpu/nf4_block.h"
#include "nf4/cpu/nf4_kernels.h"

namespace peft_ext {
namespace {

template <typename T>
void quantize_range(const T* x, int64_t n, int64_t blocksize, int64_t begin, int64_t end, uint8_t* packed,
                    float* absmax) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * blocksize;
    uint8_t* out = packed + start / 2;
    if (n - start < blocksize) {
      quantize_tail(x + start, n - start, out, absmax + block);
      continue;
    }
    absmax[block] = block_absmax(x + start, blocksize);
    quantize_block(x + start, blocksize, true, absmax[block], out);
  }
}

void quantize(const void* x, DType dtype, int64_t n, int64_t blocksize, int64_t begin, int64_t end, uint8_t* packed,
              float* absmax) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    quantize_range(static_cast<const T*>(x), n, blocksize, begin, end, packed, absmax);
  });
}

template <typename T>
void dequantize_range(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, int64_t begin,
                      int64_t end, T* out) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * blocksize;
    dequantize_block(packed + start / 2, absmax[block - begin], 0, min_i64(blocksize, n - start), out + start);
  }
}

void dequantize(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, int64_t begin, int64_t end,
                void* out, DType dtype) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    dequantize_range(packed, absmax, n, blocksize, begin, end, static_cast<T*>(out));
  });
}

void decode_scales(const Nf4Scales& scales, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) out[i - begin] = decode_scale(scales, i);
}

}  // namespace

const Nf4Kernels kNf4KernelsScalar = {quantize, dequantize, nullptr, 0, decode_scales};

}  // namespace peft_ext
