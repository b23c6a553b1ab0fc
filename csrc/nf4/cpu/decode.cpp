// Dequantizes NF4 weights on the CPU, on one or all threads: w_i = code[q_i] * absmax_b, by the kernels of
// nf4_kernels.h.
#include "nf4/cpu/decode.h"

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace peft_ext {

const Nf4Kernels& nf4_kernels() {
#if defined(__x86_64__)
  return select_kernels(&kNf4KernelsScalar, &kNf4KernelsAvx2, &kNf4KernelsAvx512);
#elif defined(__aarch64__)
  return select_kernels(&kNf4KernelsScalar, &kNf4KernelsNeon);
#else
  return kNf4KernelsScalar;
#endif
}

Scales::Scales(const FrozenWeight& weight) : nested_(weight.nested_absmax.has_value()) {
  if (!nested_) {
    plain_ = weight.absmax->const_data_ptr<float>();
    return;
  }
  held_.codes = weight.absmax->const_data_ptr<uint8_t>();
  held_.absmax = weight.nested_absmax->const_data_ptr<float>();
  held_.code = weight.nested_code->const_data_ptr<float>();
  held_.offset = *weight.nested_offset->const_data_ptr<float>();
}

const float* Scales::decode(int64_t begin, int64_t end, float* buffer) const {
  if (!nested_) return plain_ + begin;
  nf4_kernels().decode_scales(held_, begin, end, buffer);
  return buffer;
}

namespace {

// Dequantizes the blocks [begin, end) on one thread. `out` points to the first element of block `begin`.
void dequantize_blocks(const FrozenWeight& weight, int64_t begin, int64_t end, void* out, DType dtype) {
  const int64_t n = checked_numel(weight.shape), width = dtype == DType::kF32 ? 4 : 2;
  const Scales scales(weight);
  const uint8_t* packed = weight.weight.const_data_ptr<uint8_t>();
  float buffer[kScaleChunk];
  for (int64_t first = begin; first < end; first += kScaleChunk) {
    const int64_t last = min_i64(first + kScaleChunk, end);
    // The kernel writes block b at an offset of b blocks from the pointer that the kernel gets.
    char* origin = static_cast<char*>(out) - begin * weight.blocksize * width;
    nf4_kernels().dequantize(packed, scales.decode(first, last, buffer), n, weight.blocksize, first, last, origin,
                             dtype);
  }
}

// Dequantizes the blocks [begin, end) on all threads.
void dequantize_into(const FrozenWeight& weight, int64_t begin, int64_t end, void* out, DType dtype) {
  const int64_t width = dtype == DType::kF32 ? 4 : 2;
  parallel_for(begin, end, ceil_div(kDecodeGrain, weight.blocksize), [&](int64_t first, int64_t last) {
    dequantize_blocks(weight, first, last, static_cast<char*>(out) + (first - begin) * weight.blocksize * width, dtype);
  });
}

}  // namespace

Tensor dense_weight(const char* op, const FrozenWeight& weight, ScalarType type) {
  if (!weight.is_nf4()) {
    check_matrix_weight(op, weight, type);
    return weight.weight;
  }
  Tensor dense = empty(weight.shape, type);
  if (dense.numel() > 0) {
    const int64_t blocks = ceil_div(checked_numel(weight.shape), weight.blocksize);
    dequantize_into(weight, 0, blocks, dense.mutable_data_ptr(), dtype_of(op, "dtype", type));
  }
  return dense;
}

Tensor working_weight(const char* op, const FrozenWeight& weight, ScalarType type) {
  const int64_t elements = checked_numel(weight.shape);
  if (!weight.is_nf4() || elements == 0) return dense_weight(op, weight, type);
  const size_t width = type == ScalarType::Float ? sizeof(float) : sizeof(bf16);
  void* room = scratch(Scratch::kWeight, static_cast<size_t>(elements) * width);
  dequantize_into(weight, 0, ceil_div(elements, weight.blocksize), room, dtype_of(op, "dtype", type));
  return torch::stable::from_blob(room, weight.shape, row_major_strides(weight.shape),
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
}

int64_t nested_scales(const FrozenWeight& weight) {
  return weight.nested_absmax.has_value() ? weight.absmax->numel() : 0;
}

const float* all_scales(const FrozenWeight& weight, float* room) {
  const int64_t blocks = weight.absmax->numel();
  const Scales scales(weight);
  if (!weight.nested_absmax.has_value()) return scales.decode(0, blocks, nullptr);
  parallel_for(0, blocks, kDecodeGrain / 64,
               [&](int64_t begin, int64_t end) { scales.decode(begin, end, room + begin); });
  return room;
}

const void* dequantize_range(const FrozenWeight& weight, int64_t begin, int64_t end, DType dtype, void* room) {
  const int64_t first = begin / weight.blocksize, width = dtype == DType::kF32 ? 4 : 2;
  dequantize_blocks(weight, first, ceil_div(end, weight.blocksize), room, dtype);
  return static_cast<const char*>(room) + (begin - first * weight.blocksize) * width;
}

Tensor dequantized_rows(const char* op, const FrozenWeight& weight, int64_t begin, int64_t end, ScalarType type) {
  const int64_t k = weight.in_features(), first = begin * k / weight.blocksize;
  const int64_t last = ceil_div(end * k, weight.blocksize);
  Tensor blocks = empty({(last - first) * weight.blocksize}, type);
  if (last > first) dequantize_into(weight, first, last, blocks.mutable_data_ptr(), dtype_of(op, "dtype", type));
  const Tensor rows = torch::stable::narrow(blocks, 0, begin * k - first * weight.blocksize, (end - begin) * k);
  return as_shape(rows, {end - begin, k});
}

}  // namespace peft_ext
