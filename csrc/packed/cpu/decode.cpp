// Decodes packed weights on the CPU, on one or all threads: NF4 by the kernels of nf4_kernels.h, and the other formats
// by the kernels of format_kernels.h.
#include "packed/cpu/decode.h"

#include "common/registration.h"
#include "cpu/isa.h"
#include "cpu/operator_call.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace peft_ext {

const FormatKernels& format_kernels(int64_t layout) {
  const auto number = static_cast<size_t>(layout >> kFormatShift & 0xff) % kFormatNumbers;
#if defined(__x86_64__)
  return select_kernels(&kFormatTableScalar, &kFormatTableAvx2, &kFormatTableAvx512).of[number];
#elif defined(__aarch64__)
  return select_kernels(&kFormatTableScalar, &kFormatTableNeon).of[number];
#else
  return kFormatTableScalar.of[number];
#endif
}

Scales::Scales(const FrozenWeight& weight) : nested_(weight.is_nested()) {
  if (!nested_) {
    plain_ = weight.absmax().const_data_ptr<float>();
    return;
  }
  held_.codes = weight.absmax().const_data_ptr<uint8_t>();
  held_.absmax = weight.parts[1]->const_data_ptr<float>();
  held_.code = weight.parts[2]->const_data_ptr<float>();
  offset_ = weight.parts[3]->const_data_ptr<float>();
}

const float* Scales::decode(int64_t begin, int64_t end, float* buffer) const {
  if (!nested_) return plain_ + begin;
  Nf4Scales scales = held_;
  scales.offset = *offset_;
  nf4_kernels().decode_scales(scales, begin, end, buffer);
  return buffer;
}

void Scales::prefetch(int64_t begin, int64_t end) const {
  constexpr int64_t kLine = 64;  // bytes of a cache line
  if (!nested_) return;
  for (int64_t at = begin; at < end; at += kLine) __builtin_prefetch(held_.codes + at);
  __builtin_prefetch(held_.absmax + begin / kNestedBlock);
}

namespace {

// Dequantizes the NF4 blocks [begin, end) on one thread. `out` points to the first element of block `begin`.
void dequantize_blocks(const FrozenWeight& weight, int64_t begin, int64_t end, void* out, DType dtype) {
  const int64_t n = checked_numel(weight.shape), width = dtype == DType::kF32 ? 4 : 2;
  const Scales scales(weight);
  const uint8_t* packed = weight.weight.const_data_ptr<uint8_t>();
  float buffer[kScaleChunk];
  for (int64_t first = begin; first < end; first += kScaleChunk) {
    const int64_t last = min_i64(first + kScaleChunk, end);
    // The kernel writes block b at an offset of b blocks from the pointer that the kernel gets.
    char* origin = static_cast<char*>(out) - begin * weight.blocksize() * width;
    nf4_kernels().dequantize(packed, scales.decode(first, last, buffer), n, weight.blocksize(), first, last, origin,
                             dtype);
  }
}

// Dequantizes the NF4 blocks [begin, end) on all threads.
void dequantize_into(const FrozenWeight& weight, int64_t begin, int64_t end, void* out, DType dtype) {
  const int64_t width = dtype == DType::kF32 ? 4 : 2;
  parallel_for(begin, end, ceil_div(kDecodeGrain, weight.blocksize()), [&](int64_t first, int64_t last) {
    dequantize_blocks(weight, first, last, static_cast<char*>(out) + (first - begin) * weight.blocksize() * width,
                      dtype);
  });
}

// Decodes the rows [begin, end) of a weight in a format of format_kernels.h on all threads.
void decode_rows_into(const FrozenWeight& weight, int64_t begin, int64_t end, void* out, DType dtype) {
  const int64_t k = weight.in_features(), width = dtype == DType::kF32 ? 4 : 2;
  const PackedView view = view_of(weight);
  const FormatKernels& kernels = format_kernels(weight.layout);
  parallel_for(begin, end, ceil_div(kDecodeGrain, k + 1), [&](int64_t first, int64_t last) {
    kernels.decode(view, first, last - first, 0, k, static_cast<char*>(out) + (first - begin) * k * width, k, dtype);
  });
}

// Decodes a whole packed weight on all threads.
void decode_into(const FrozenWeight& weight, void* out, DType dtype) {
  if (weight.is_nf4())
    dequantize_into(weight, 0, ceil_div(checked_numel(weight.shape), weight.blocksize()), out, dtype);
  else
    decode_rows_into(weight, 0, weight.out_features(), out, dtype);
}

}  // namespace

Tensor dense_weight(const char* op, const FrozenWeight& weight, ScalarType type) {
  if (!weight.is_packed()) {
    check_matrix_weight(op, weight, type);
    return weight.weight;
  }
  Tensor dense = empty(weight.shape, type);
  if (dense.numel() > 0) decode_into(weight, dense.mutable_data_ptr(), dtype_of(op, "dtype", type));
  return dense;
}

Tensor working_weight(const char* op, const FrozenWeight& weight, ScalarType type) {
  const int64_t elements = checked_numel(weight.shape);
  if (!weight.is_packed() || elements == 0) return dense_weight(op, weight, type);
  const size_t width = type == ScalarType::Float ? sizeof(float) : sizeof(bf16);
  void* room = scratch(Scratch::kWeight, static_cast<size_t>(elements) * width);
  decode_into(weight, room, dtype_of(op, "dtype", type));
  return torch::stable::from_blob(room, weight.shape, row_major_strides(weight.shape),
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
}

int64_t nested_scales(const FrozenWeight& weight) { return weight.is_nested() ? weight.absmax().numel() : 0; }

const float* all_scales(const FrozenWeight& weight, float* room) {
  const int64_t blocks = weight.absmax().numel();
  const Scales scales(weight);
  if (!weight.is_nested()) return scales.decode(0, blocks, nullptr);
  parallel_for(0, blocks, kDecodeGrain / 64,
               [&](int64_t begin, int64_t end) { scales.decode(begin, end, room + begin); });
  return room;
}

const void* dequantize_range(const FrozenWeight& weight, int64_t begin, int64_t end, DType dtype, void* room) {
  const int64_t first = begin / weight.blocksize(), width = dtype == DType::kF32 ? 4 : 2;
  dequantize_blocks(weight, first, ceil_div(end, weight.blocksize()), room, dtype);
  return static_cast<const char*>(room) + (begin - first * weight.blocksize()) * width;
}

int64_t room_of_rows(const FrozenWeight& weight, int64_t rows) {
  // A block of NF4 may span rows, so that the first block of the rows may begin in the row before, and the last block
  // may end in the row after.
  return rows * weight.in_features() + (weight.is_nf4() ? 2 * weight.blocksize() : 0);
}

const void* decode_rows(const FrozenWeight& weight, int64_t begin, int64_t end, DType dtype, void* room) {
  const int64_t k = weight.in_features();
  if (weight.is_nf4()) return dequantize_range(weight, begin * k, end * k, dtype, room);
  format_kernels(weight.layout).decode(view_of(weight), begin, end - begin, 0, k, room, k, dtype);
  return room;
}

Tensor dequantized_rows(const char* op, const FrozenWeight& weight, int64_t begin, int64_t end, ScalarType type) {
  const int64_t k = weight.in_features();
  const DType dtype = dtype_of(op, "dtype", type);
  if (!weight.is_nf4()) {
    Tensor rows = empty({end - begin, k}, type);
    if (rows.numel() > 0) decode_rows_into(weight, begin, end, rows.mutable_data_ptr(), dtype);
    return rows;
  }
  const int64_t first = begin * k / weight.blocksize(), last = ceil_div(end * k, weight.blocksize());
  Tensor blocks = empty({(last - first) * weight.blocksize()}, type);
  if (last > first) dequantize_into(weight, first, last, blocks.mutable_data_ptr(), dtype);
  const Tensor rows = torch::stable::narrow(blocks, 0, begin * k - first * weight.blocksize(), (end - begin) * k);
  return as_shape(rows, {end - begin, k});
}

namespace {

Tensor nf4_dequantize_cpu(Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2,
                          std::optional<Tensor> part3, std::optional<Tensor> part4, int64_t layout,
                          std::vector<int64_t> shape, ScalarType type) {
  constexpr const char* kOp = "nf4_dequantize";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  STD_TORCH_CHECK(held.is_packed(), kOp, ": layout is 0, wanted a packed weight");
  if (type == ScalarType::Double) return as_type(dense_weight(kOp, held, ScalarType::Float), type);
  return dense_weight(kOp, held, type);
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) { m.impl("nf4_dequantize", PEFT_EXT_CPU_BOX(&peft_ext::nf4_dequantize_cpu)); }
