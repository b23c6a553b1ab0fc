// NF4 operators on the CPU: checks, allocation, threads. The arithmetic is in nf4_<isa>.cpp.
#include <algorithm>
#include <tuple>
#include <vector>

#include "common/frozen_weight.h"
#include "common/isa.h"
#include "nf4/nf4_kernels.h"

namespace peft_ext {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kNestedBlock = 256;
// Scales decoded at a time, on the stack.
constexpr int64_t kScaleChunk = 512;
// Elements a thread takes at least: about 20 microseconds of work.
constexpr int64_t kGrain = 1 << 16;

const Nf4Kernels& kernels() {
#if defined(__x86_64__)
  return select_kernels(&kNf4KernelsScalar, &kNf4KernelsAvx2, &kNf4KernelsAvx512);
#else
  return kNf4KernelsScalar;
#endif
}

struct SkinnyKernel {
  void (*run)(const Nf4Skinny& work, int64_t begin, int64_t end);
  int64_t tokens;  // at most; 0: there is none
};

SkinnyKernel skinny_kernel(bool bf16_x) {
#if defined(__x86_64__)
  static const bool has_bf16 = cpu_has_avx512_bf16();
  if (bf16_x && has_bf16 && current_isa() == Isa::kAvx512) return {nf4_skinny_bf16_avx512, kSkinnyTokensBf16};
#endif
  return {kernels().skinny, kernels().skinny_tokens};
}

void check_blocksize(const char* op, int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op, ": blocksize is ",
                  blocksize, ", wanted a power of two from 32 to 4096");
}

int64_t numel_of(const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  return numel;
}

Tensor checked_part(const char* op, const char* argument, const Tensor& tensor, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == numel, op, ": ", argument, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), " with ", tensor.numel(), " elements, wanted ",
                  torch::headeronly::toString(type), " with ", numel);
  return torch::stable::contiguous(tensor);
}

// The float32 scales of any range of blocks, double-quantized ones decoded: multiplied, then added, each rounded.
class Scales {
 public:
  explicit Scales(const FrozenWeight& weight) : nested_(weight.nested_absmax.has_value()) {
    if (!nested_) {
      plain_ = weight.absmax->const_data_ptr<float>();
      return;
    }
    codes_ = weight.absmax->const_data_ptr<uint8_t>();
    scale_ = weight.nested_absmax->const_data_ptr<float>();
    table_ = weight.nested_code->const_data_ptr<float>();
    offset_ = *weight.nested_offset->const_data_ptr<float>();
  }

  // Scales of blocks [begin, end); they lie in buffer, which has room for them, or where they were.
  const float* decode(int64_t begin, int64_t end, float* buffer) const {
    if (!nested_) return plain_ + begin;
    for (int64_t i = begin; i < end; ++i) {
      const float product = table_[codes_[i]] * scale_[i / kNestedBlock];
      buffer[i - begin] = product + offset_;
    }
    return buffer;
  }

 private:
  bool nested_;
  const float* plain_ = nullptr;
  const uint8_t* codes_ = nullptr;
  const float* scale_ = nullptr;
  const float* table_ = nullptr;
  float offset_ = 0.0f;
};

void dequantize_into(const FrozenWeight& weight, void* out, DType dtype) {
  const int64_t n = numel_of(weight.shape);
  const Scales scales(weight);
  const uint8_t* packed = weight.weight.const_data_ptr<uint8_t>();
  const Nf4Kernels& isa = kernels();
  parallel_for(0, ceil_div(n, weight.blocksize), ceil_div(kGrain, weight.blocksize), [&](int64_t begin, int64_t end) {
    float buffer[kScaleChunk];
    for (int64_t first = begin; first < end; first += kScaleChunk) {
      const int64_t last = min_i64(first + kScaleChunk, end);
      isa.dequantize(packed, scales.decode(first, last, buffer), n, weight.blocksize, first, last, out, dtype);
    }
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
  const Nf4Kernels& isa = kernels();
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

void check_columns(const char* op, const char* argument, const Tensor& x, int64_t wanted) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == wanted, op, ": ", argument, " has ",
                  x.dim() >= 1 ? x.size(x.dim() - 1) : 0, " columns, wanted ", wanted);
}

// y = sums + bias, rounded once to y's dtype.
void finish_rows(const char* op, const Tensor& sums, const std::optional<Tensor>& bias, const Tensor& y) {
  const int64_t tokens = y.size(0), n = y.size(1);
  const float* in = sums.const_data_ptr<float>();
  std::optional<Tensor> held;
  if (bias.has_value()) held = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
  const float* add = held.has_value() ? held->const_data_ptr<float>() : nullptr;
  with_dtype(dtype_of(op, "x", y), [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(y.mutable_data_ptr());
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t j = 0; j < n; ++j) out[i * n + j] = from_float<T>(in[i * n + j] + (add ? add[j] : 0.0f));
  });
}

Tensor nf4_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                      std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                      std::vector<int64_t> shape, std::optional<Tensor> bias) {
  constexpr const char* kOp = "nf4_linear";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  const int64_t k = held.in_features(), n = held.out_features();
  check_columns(kOp, "x", x, k);
  x = torch::stable::contiguous(x);
  Tensor y = empty(with_last(x, n), x.scalar_type());
  if (y.numel() == 0) return y;
  const int64_t tokens = rows_of(x);
  const Tensor flat_x = torch::stable::view(x, {tokens, k});
  Tensor flat_y = torch::stable::view(y, {tokens, n});
  if (bias.has_value()) STD_TORCH_CHECK(bias->numel() == n, kOp, ": bias has ", bias->numel(), " elements, wanted ", n);
  if (skinny_takes(held, x.scalar_type(), tokens)) {
    finish_rows(kOp, skinny_product(kOp, flat_x, held), bias, flat_y);
    return y;
  }
  const Tensor dense = transposed(dense_weight(kOp, held, x.scalar_type()));
  if (bias.has_value()) {
    torch::stable::copy_(flat_y, *bias);
    addmm_(flat_y, flat_x, dense, 1.0);
  } else {
    mm_out(flat_y, flat_x, dense);
  }
  return y;
}

Tensor nf4_linear_backward_cpu(Tensor grad, Tensor weight, std::optional<Tensor> absmax,
                               std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                               std::optional<Tensor> nested_offset, int64_t blocksize, std::vector<int64_t> shape) {
  constexpr const char* kOp = "nf4_linear_backward";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  check_columns(kOp, "grad", grad, held.out_features());
  grad = torch::stable::contiguous(grad);
  Tensor grad_x = empty(with_last(grad, held.in_features()), grad.scalar_type());
  if (grad_x.numel() == 0) return grad_x;
  const int64_t tokens = rows_of(grad);
  mm_out(torch::stable::view(grad_x, {tokens, held.in_features()}),
         torch::stable::view(grad, {tokens, held.out_features()}), dense_weight(kOp, held, grad.scalar_type()));
  return grad_x;
}

}  // namespace

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

bool skinny_takes(const FrozenWeight& weight, ScalarType type, int64_t tokens) {
  return weight.is_nf4() && tokens <= skinny_kernel(type == ScalarType::BFloat16).tokens &&
         weight.blocksize % kSkinnyStep == 0 && weight.in_features() % kSkinnyStep == 0 && weight.in_features() > 0;
}

Tensor skinny_product(const char* op, const Tensor& x, const FrozenWeight& weight) {
  const int64_t k = weight.in_features(), n = weight.out_features();
  const Tensor wide = torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
  Tensor y = empty({x.size(0), n}, ScalarType::Float);
  Nf4Skinny work;
  work.packed = weight.weight.const_data_ptr<uint8_t>();
  work.blocksize = weight.blocksize;
  work.columns = k;
  work.rows = n;
  work.dtype = dtype_of(op, "x", x);
  work.tokens = x.size(0);
  work.x = wide.const_data_ptr<float>();
  work.x_bf16 = work.dtype == DType::kBF16 ? static_cast<const bf16*>(x.const_data_ptr()) : nullptr;
  work.y = y.mutable_data_ptr<float>();
  const Scales scales(weight);
  const auto run = skinny_kernel(work.dtype == DType::kBF16).run;
  parallel_for(0, n, ceil_div(kGrain, k * work.tokens), [&](int64_t begin, int64_t end) {
    // Rows whose scales are decoded together: about kScaleChunk blocks, at least one row.
    const int64_t rows = std::max<int64_t>(1, (kScaleChunk - 1) * weight.blocksize / k);
    std::vector<float> buffer(static_cast<size_t>(rows * k / weight.blocksize + 2));
    for (int64_t first = begin; first < end; first += rows) {
      const int64_t last = min_i64(first + rows, end);
      Nf4Skinny part = work;
      part.absmax = scales.decode(first * k / weight.blocksize, ceil_div(last * k, weight.blocksize), buffer.data());
      run(part, first, last);
    }
  });
  return y;
}

Tensor dense_weight(const char* op, const FrozenWeight& weight, ScalarType type) {
  if (!weight.is_nf4()) {
    STD_TORCH_CHECK(weight.weight.scalar_type() == type, op, ": weight is ",
                    torch::headeronly::toString(weight.weight.scalar_type()), ", wanted ",
                    torch::headeronly::toString(type));
    return weight.weight;
  }
  Tensor dense = empty(weight.shape, type);
  if (dense.numel() > 0) dequantize_into(weight, dense.mutable_data_ptr(), dtype_of(op, "dtype", type));
  return dense;
}

}  // namespace peft_ext

STABLE_TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("nf4_quantize", TORCH_BOX(&peft_ext::nf4_quantize_cpu));
  m.impl("nf4_quantize_absmax", TORCH_BOX(&peft_ext::nf4_quantize_absmax_cpu));
  m.impl("nf4_dequantize", TORCH_BOX(&peft_ext::nf4_dequantize_cpu));
  m.impl("nf4_linear", TORCH_BOX(&peft_ext::nf4_linear_cpu));
  m.impl("nf4_linear_backward", TORCH_BOX(&peft_ext::nf4_linear_backward_cpu));
}
