// NF4 operators on the CPU: checks, allocation, threads. The arithmetic is in nf4_<isa>.cpp.
#include <algorithm>
#include <tuple>
#include <vector>

#include "common/frozen_weight.h"
#include "common/isa.h"
#include "linear/adapted_linear.h"
#include "linear/scratch.h"
#include "nf4/nf4_kernels.h"

namespace peft_ext {
namespace {

using torch::stable::parallel_for;

// Scales decoded at a time, on the stack.
constexpr int64_t kScaleChunk = 512;
// Elements a thread takes at least: about 20 microseconds of work.
constexpr int64_t kGrain = 1 << 16;

struct SkinnyKernel {
  void (*run)(const Nf4Skinny& work, int64_t begin, int64_t end);
  int64_t tokens;  // at most; 0: there is none
};

SkinnyKernel skinny_kernel(bool bf16_x) {
#if defined(__x86_64__)
  if (bf16_x && current_isa() >= Isa::kAvx512Bf16) return {nf4_skinny_bf16_avx512, kSkinnyTokensBf16};
#endif
  return {nf4_kernels().skinny, nf4_kernels().skinny_tokens};
}

void check_blocksize(const char* op, int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op, ": blocksize is ",
                  blocksize, ", wanted a power of two from 32 to 4096");
}

int64_t numel_of(const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "peft_ext: shape has ", size, ", wanted sizes of 0 and more");
    numel = checked_product(numel, size);
  }
  return numel;
}

Tensor checked_part(const char* op, const char* argument, const Tensor& tensor, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == numel, op, ": ", argument, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), " with ", tensor.numel(), " elements, wanted ",
                  torch::headeronly::toString(type), " with ", numel);
  return torch::stable::contiguous(tensor);
}

// The float32 scales of any range of blocks, double-quantized ones decoded.
class Scales {
 public:
  explicit Scales(const FrozenWeight& weight) : nested_(weight.nested_absmax.has_value()) {
    if (!nested_) {
      plain_ = weight.absmax->const_data_ptr<float>();
      return;
    }
    held_.codes = weight.absmax->const_data_ptr<uint8_t>();
    held_.absmax = weight.nested_absmax->const_data_ptr<float>();
    held_.code = weight.nested_code->const_data_ptr<float>();
    held_.offset = *weight.nested_offset->const_data_ptr<float>();
  }

  // Scales of blocks [begin, end); they lie in buffer, which has room for them, or where they were.
  const float* decode(int64_t begin, int64_t end, float* buffer) const {
    if (!nested_) return plain_ + begin;
    nf4_kernels().decode_scales(held_, begin, end, buffer);
    return buffer;
  }

 private:
  bool nested_;
  const float* plain_ = nullptr;
  Nf4Scales held_{};
};

// Blocks [begin, end), by one thread. `out` is where the first element of block `begin` goes.
void dequantize_blocks(const FrozenWeight& weight, int64_t begin, int64_t end, void* out, DType dtype) {
  const int64_t n = numel_of(weight.shape), width = dtype == DType::kF32 ? 4 : 2;
  const Scales scales(weight);
  const uint8_t* packed = weight.weight.const_data_ptr<uint8_t>();
  float buffer[kScaleChunk];
  for (int64_t first = begin; first < end; first += kScaleChunk) {
    const int64_t last = min_i64(first + kScaleChunk, end);
    // The kernel writes block b at b blocks from its argument.
    char* origin = static_cast<char*>(out) - begin * weight.blocksize * width;
    nf4_kernels().dequantize(packed, scales.decode(first, last, buffer), n, weight.blocksize, first, last, origin,
                             dtype);
  }
}

// Blocks [begin, end), over all threads.
void dequantize_into(const FrozenWeight& weight, int64_t begin, int64_t end, void* out, DType dtype) {
  const int64_t width = dtype == DType::kF32 ? 4 : 2;
  parallel_for(begin, end, ceil_div(kGrain, weight.blocksize), [&](int64_t first, int64_t last) {
    dequantize_blocks(weight, first, last, static_cast<char*>(out) + (first - begin) * weight.blocksize * width, dtype);
  });
}

std::tuple<Tensor, Tensor> nf4_quantize_cpu(Tensor weight, int64_t blocksize) {
  constexpr const char* kOp = "nf4_quantize";
  check_blocksize(kOp, blocksize);
  if (weight.scalar_type() == ScalarType::Double) weight = torch::stable::to(weight, ScalarType::Float);
  weight = torch::stable::contiguous(weight);
  const DType dtype = dtype_of(kOp, "weight", weight);
  const int64_t n = weight.numel();
  Tensor packed = empty({ceil_div(n, 2), 1}, ScalarType::Byte);
  Tensor absmax = empty({ceil_div(n, blocksize)}, ScalarType::Float);
  const void* in = weight.const_data_ptr();
  uint8_t* codes = packed.mutable_data_ptr<uint8_t>();
  float* scales = absmax.mutable_data_ptr<float>();
  const Nf4Kernels& isa = nf4_kernels();
  parallel_for(0, ceil_div(n, blocksize), ceil_div(kGrain, blocksize),
               [&](int64_t begin, int64_t end) { isa.quantize(in, dtype, n, blocksize, begin, end, codes, scales); });
  return {packed, absmax};
}

// The nearest of an ascending table of 256: the number of thresholds below the value, by bisection without branches.
uint8_t nearest(const float* thresholds, float value) {
  int code = 0;
  for (int step = 128; step > 0; step /= 2) code += !(thresholds[code + step - 1] >= value) ? step : 0;
  return static_cast<uint8_t>(code);
}

std::tuple<Tensor, Tensor> nf4_quantize_absmax_cpu(Tensor centred, Tensor code) {
  constexpr const char* kOp = "nf4_quantize_absmax";
  const int64_t n = centred.numel();
  const int64_t groups = ceil_div(n, kNestedBlock);
  centred = checked_part(kOp, "centred", centred, ScalarType::Float, n);
  code = checked_part(kOp, "code", code, ScalarType::Float, 256);
  float thresholds[255];
  const float* table = code.const_data_ptr<float>();
  for (int i = 0; i < 255; ++i) thresholds[i] = (table[i] + table[i + 1]) / 2;
  Tensor codes = empty({n}, ScalarType::Byte);
  Tensor absmax = empty({groups}, ScalarType::Float);
  const float* in = centred.const_data_ptr<float>();
  uint8_t* out = codes.mutable_data_ptr<uint8_t>();
  float* scales = absmax.mutable_data_ptr<float>();
  parallel_for(0, groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t start = group * kNestedBlock, stop = min_i64(start + kNestedBlock, n);
      float largest = 0.0f;
      for (int64_t i = start; i < stop; ++i) {
        const float a = __builtin_fabsf(in[i]);
        if (a > largest || a != a) largest = a;
        if (largest != largest) break;
      }
      scales[group] = largest;
      const float inverse = 1.0f / (largest < 1e-38f ? 1e-38f : largest);
      for (int64_t i = start; i < stop; ++i) out[i] = nearest(thresholds, in[i] * inverse);
    }
  });
  return {codes, absmax};
}

Tensor nf4_dequantize_cpu(Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                          std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                          std::vector<int64_t> shape, ScalarType type) {
  constexpr const char* kOp = "nf4_dequantize";
  STD_TORCH_CHECK(absmax.has_value(), kOp, ": absmax is None, wanted the scales of an NF4 weight");
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  if (type == ScalarType::Double) return torch::stable::to(dense_weight(kOp, held, ScalarType::Float), type);
  return dense_weight(kOp, held, type);
}

Tensor nf4_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                      std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                      std::vector<int64_t> shape, std::optional<Tensor> bias) {
  constexpr const char* kOp = "nf4_linear";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  return adapted_forward(kOp, x, held, bias, Adapter(), false, false).y;
}

Tensor nf4_linear_backward_cpu(Tensor grad, Tensor weight, std::optional<Tensor> absmax,
                               std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                               std::optional<Tensor> nested_offset, int64_t blocksize, std::vector<int64_t> shape) {
  constexpr const char* kOp = "nf4_linear_backward";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  STD_TORCH_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == held.out_features(), kOp, ": grad has ", grad.numel(),
                  " elements, wanted rows of ", held.out_features());
  return frozen_backward(kOp, grad, held);
}

}  // namespace

const Nf4Kernels& nf4_kernels() {
#if defined(__x86_64__)
  return select_kernels(&kNf4KernelsScalar, &kNf4KernelsAvx2, &kNf4KernelsAvx512);
#else
  return kNf4KernelsScalar;
#endif
}

FrozenWeight checked_weight(const char* op, Tensor weight, std::optional<Tensor> absmax,
                            std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                            std::optional<Tensor> nested_offset, int64_t blocksize, std::vector<int64_t> shape) {
  FrozenWeight held{weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape};
  if (!held.is_nf4()) {
    STD_TORCH_CHECK(weight.dim() == 2, op, ": weight has ", weight.dim(), " dimensions, wanted 2");
    held.shape.assign(weight.sizes().begin(), weight.sizes().end());
    return held;
  }
  check_blocksize(op, blocksize);
  const int64_t n = numel_of(shape), blocks = ceil_div(n, blocksize);
  held.weight = checked_part(op, "weight", weight, ScalarType::Byte, ceil_div(n, 2));
  const bool nested = nested_absmax.has_value();
  held.absmax = checked_part(op, "absmax", *absmax, nested ? ScalarType::Byte : ScalarType::Float, blocks);
  if (nested) {
    STD_TORCH_CHECK(nested_code.has_value() && nested_offset.has_value(), op,
                    ": nested_absmax is given without nested_code and nested_offset");
    held.nested_absmax =
        checked_part(op, "nested_absmax", *nested_absmax, ScalarType::Float, ceil_div(blocks, kNestedBlock));
    held.nested_code = checked_part(op, "nested_code", *nested_code, ScalarType::Float, 256);
    held.nested_offset = checked_part(op, "nested_offset", *nested_offset, ScalarType::Float, 1);
  }
  return held;
}

void check_matrix_weight(const char* op, const FrozenWeight& weight, ScalarType type) {
  STD_TORCH_CHECK(weight.shape.size() == 2, op, ": weight has ", weight.shape.size(), " dimensions, wanted [N, K]");
  STD_TORCH_CHECK(weight.is_nf4() || weight.weight.scalar_type() == type, op, ": weight is ",
                  torch::headeronly::toString(weight.weight.scalar_type()), ", wanted ",
                  torch::headeronly::toString(type));
}

bool skinny_takes(const FrozenWeight& weight, ScalarType type, int64_t tokens) {
  return weight.is_nf4() && tokens <= skinny_kernel(type == ScalarType::BFloat16).tokens &&
         weight.blocksize % kSkinnyStep == 0 && weight.in_features() % kSkinnyStep == 0 && weight.in_features() > 0;
}

Tensor skinny_product(const char* op, const Tensor& x, const FrozenWeight& weight) {
  const int64_t k = weight.in_features(), n = weight.out_features(), tokens = x.size(0);
  const SkinnyKernel kernel = skinny_kernel(x.scalar_type() == ScalarType::BFloat16);
  Tensor y = empty({tokens, n}, ScalarType::Float);
  Nf4Skinny work;
  work.packed = weight.weight.const_data_ptr<uint8_t>();
  work.block_shift = __builtin_ctzll(static_cast<unsigned long long>(weight.blocksize));
  work.columns = k;
  work.rows = n;
  work.dtype = dtype_of(op, "x", x);
  work.tokens = tokens;
  work.x = nullptr;
  work.x_nibbles = nullptr;
  Tensor held;
#if defined(__x86_64__)
  if (kernel.run == nf4_skinny_bf16_avx512) {
    held = empty({tokens, nibble_columns(k)}, ScalarType::BFloat16);
    auto* out = static_cast<bf16*>(held.mutable_data_ptr());
    const auto* in = static_cast<const bf16*>(x.const_data_ptr());
    for (int64_t t = 0; t < tokens; ++t) nf4_nibble_order(in + t * k, k, out + t * nibble_columns(k));
    work.x_nibbles = out;
  }
#endif
  if (work.x_nibbles == nullptr) {
    held = torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
    work.x = held.const_data_ptr<float>();
  }
  work.y = y.mutable_data_ptr<float>();
  const Scales scales(weight);
  parallel_for(0, n, ceil_div(kGrain, k * work.tokens), [&](int64_t begin, int64_t end) {
    // Rows whose scales are decoded together: about kScaleChunk blocks, at least one row.
    const int64_t rows = std::max<int64_t>(1, (kScaleChunk - 1) * weight.blocksize / k);
    std::vector<float> buffer(static_cast<size_t>(rows * k / weight.blocksize + 2));
    for (int64_t first = begin; first < end; first += rows) {
      const int64_t last = min_i64(first + rows, end);
      Nf4Skinny part = work;
      part.absmax = scales.decode(first * k / weight.blocksize, ceil_div(last * k, weight.blocksize), buffer.data());
      kernel.run(part, first, last);
    }
  });
  return y;
}

Tensor dense_weight(const char* op, const FrozenWeight& weight, ScalarType type) {
  if (!weight.is_nf4()) {
    check_matrix_weight(op, weight, type);
    return weight.weight;
  }
  Tensor dense = empty(weight.shape, type);
  if (dense.numel() > 0) {
    const int64_t blocks = ceil_div(numel_of(weight.shape), weight.blocksize);
    dequantize_into(weight, 0, blocks, dense.mutable_data_ptr(), dtype_of(op, "dtype", type));
  }
  return dense;
}

const float* all_scales(const FrozenWeight& weight) {
  const int64_t blocks = weight.absmax->numel();
  const Scales scales(weight);
  if (!weight.nested_absmax.has_value()) return scales.decode(0, blocks, nullptr);
  auto* buffer = static_cast<float*>(scratch(Scratch::kScales, static_cast<size_t>(blocks) * sizeof(float)));
  parallel_for(0, blocks, kGrain / 64, [&](int64_t begin, int64_t end) { scales.decode(begin, end, buffer + begin); });
  return buffer;
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
  return torch::stable::view(rows, {end - begin, k});
}

}  // namespace peft_ext

STABLE_TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("nf4_quantize", TORCH_BOX(&peft_ext::nf4_quantize_cpu));
  m.impl("nf4_quantize_absmax", TORCH_BOX(&peft_ext::nf4_quantize_absmax_cpu));
  m.impl("nf4_dequantize", TORCH_BOX(&peft_ext::nf4_dequantize_cpu));
  m.impl("nf4_linear", TORCH_BOX(&peft_ext::nf4_linear_cpu));
  m.impl("nf4_linear_backward", TORCH_BOX(&peft_ext::nf4_linear_backward_cpu));
}
