// NF4 operators on the CPU: checks, allocation, threads. The arithmetic is in nf4_<isa>.cpp.
#include <tuple>

#include "nf4/cpu/decode.h"

namespace peft_ext {
namespace {

using torch::stable::parallel_for;

std::tuple<Tensor, Tensor> nf4_quantize_cpu(Tensor weight, int64_t blocksize) {
  constexpr const char* kOp = "nf4_quantize";
  check_blocksize(kOp, blocksize);
  if (weight.scalar_type() == ScalarType::Double) weight = as_type(weight, ScalarType::Float);
  weight = as_contiguous(weight);
  const DType dtype = dtype_of(kOp, "weight", weight);
  const int64_t n = weight.numel();
  Tensor packed = empty({ceil_div(n, 2), 1}, ScalarType::Byte);
  Tensor absmax = empty({ceil_div(n, blocksize)}, ScalarType::Float);
  const void* in = weight.const_data_ptr();
  uint8_t* codes = packed.mutable_data_ptr<uint8_t>();
  float* scales = absmax.mutable_data_ptr<float>();
  const Nf4Kernels& isa = nf4_kernels();
  parallel_for(0, ceil_div(n, blocksize), ceil_div(kDecodeGrain, blocksize),
               [&](int64_t begin, int64_t end) { isa.quantize(in, dtype, n, blocksize, begin, end, codes, scales); });
  return {packed, absmax};
}

constexpr int kSearches = 8;  // together: a step of one waits for the step before it

// Of each value the nearest of an ascending table of 256: the number of thresholds below it, by bisection. A product
// takes the place of a branch, which would be guessed wrong every other time.
void nearest(const float* thresholds, const float* values, uint8_t* codes) {
  int code[kSearches] = {};
#pragma GCC unroll 8
  for (int step = 128; step > 0; step /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < kSearches; ++i) code[i] += step * !(thresholds[code[i] + step - 1] >= values[i]);
  for (int i = 0; i < kSearches; ++i) codes[i] = static_cast<uint8_t>(code[i]);
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
      for (int64_t i = start; i < stop; i += kSearches) {
        const int64_t count = min_i64(kSearches, stop - i);
        float values[kSearches] = {};
        uint8_t found[kSearches];
        for (int64_t j = 0; j < count; ++j) values[j] = in[i + j] * inverse;
        nearest(thresholds, values, found);
        for (int64_t j = 0; j < count; ++j) out[i + j] = found[j];
      }
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
  if (type == ScalarType::Double) return as_type(dense_weight(kOp, held, ScalarType::Float), type);
  return dense_weight(kOp, held, type);
}

}  // namespace
}  // namespace peft_ext

STABLE_TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("nf4_quantize", TORCH_BOX(&peft_ext::nf4_quantize_cpu));
  m.impl("nf4_quantize_absmax", TORCH_BOX(&peft_ext::nf4_quantize_absmax_cpu));
  m.impl("nf4_dequantize", TORCH_BOX(&peft_ext::nf4_dequantize_cpu));
}
