// Defines the NF4 operators on the CPU: checks, allocation and threads. The kernels are in nf4_<isa>.cpp. This file
// also quantizes the scales of double-quantized weights, without kernels for each instruction set, because there is at
// most one scale for 32 elements.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/registration.h"
#include "cpu/isa.h"
#include "cpu/operator_call.h"
#include "cpu/threads.h"
#include "nf4/cpu/nf4_kernels.h"
#include "nf4/nf4_code.h"
#include "weight/frozen_weight.h"

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

namespace {

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

// NearestScale finds the index of the nearest value in an ascending table of 256 values. The result is the number of
// thresholds below the value; the thresholds are the midpoints between the table's values.
//
// Values with the same sign, exponent and first six bits of the mantissa share a bin. below_ holds the number of
// thresholds below each bin. Comparisons count the thresholds within the bin that are below the value; with
// bitsandbytes' dynamic map, a bin has at most one threshold. The first bin of a sign holds the magnitudes below about
// 2^-22, which are nearer to 0 than any threshold of the dynamic map. The last bin of a sign holds the magnitudes of 1
// and above.
class NearestScale {
 public:
  explicit NearestScale(const float* table) {
    for (int i = 0; i < 255; ++i) thresholds_[i] = (table[i] + table[i + 1]) / 2;
    thresholds_[255] = __builtin_inff();
    for (int i = 0; i < 256; ++i) ordered_[i] = in_order(thresholds_[i] + 0.0f);  // adding 0.0f turns -0 into 0
    int next = 0, before = 0;
    const auto enter = [&](float least, uint8_t& below) {
      while (!(thresholds_[next] >= least)) ++next;
      most_ = next - before > most_ ? next - before : most_;
      below = static_cast<uint8_t>(next);
      before = next;
    };
    for (int bin = kBins - 1; bin >= 0; --bin)
      enter(bin == kBins - 1 ? -__builtin_inff() : -bits_to_float(first_bits(bin + 1) - 1), below_[kBins + bin]);
    for (int bin = 0; bin < kBins; ++bin) enter(bin == 0 ? 0.0f : bits_to_float(first_bits(bin)), below_[bin]);
    most_ = 255 - before > most_ ? 255 - before : most_;
  }

  // Multiplies `count` values by `factor`, and writes for each product the index of the nearest value in the table of
  // 256 values.
  // `count` is at most kNestedBlock, and no product is NaN.
  void codes(const float* values, float factor, int64_t count, uint8_t* out) const {
    int32_t ordered[kNestedBlock], bins[kNestedBlock];
    for (int64_t i = 0; i < count; ++i) {
      const float value = values[i] * factor;
      ordered[i] = in_order(value);
      const uint32_t bits = float_to_bits(value);
      const int32_t bin = static_cast<int32_t>((bits & 0x7fffffffu) >> kShift) - kFirst;
      const int32_t at = bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
      bins[i] = at + (static_cast<int32_t>(bits) < 0 ? kBins : 0);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int below = below_[bins[i]];
      out[i] = static_cast<uint8_t>(below + (ordered_[below] < ordered[i]));
    }
    for (int more = 1; more < most_; ++more)  // most_ is 1 for bitsandbytes' dynamic map
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(out[i] + (ordered_[out[i]] < ordered[i]));
  }

  uint8_t code(float value) const {  // a NaN has code 255
    int code = 0;
    for (int i = 0; i < 255; ++i) code += !(thresholds_[i] >= value);
    return static_cast<uint8_t>(code);
  }

 private:
  static constexpr int kShift = 23 - 6, kFirst = (127 - 22) << 6, kBins = (22 << 6) + 1;

  static uint32_t first_bits(int bin) { return static_cast<uint32_t>(bin + kFirst) << kShift; }

  // Maps a float to an integer, so that the integers have the order of the floats. Comparing integers takes half the
  // time of comparing floats.
  static int32_t in_order(float value) {
    const auto bits = static_cast<int32_t>(float_to_bits(value));
    return bits ^ ((bits >> 31) & 0x7fffffff);
  }

  float thresholds_[256];
  int32_t ordered_[256];      // the thresholds, mapped to integers by in_order
  uint8_t below_[2 * kBins];  // numbers of thresholds below the bins of positive, and then of negative values
  int most_ = 0;              // largest number of thresholds in one bin
};

// Returns the mean of the scales, which are magnitudes. The scales are summed as integers, in units of about n · 2^-62
// of the largest scale for n scales, so that the order of the sum does not change the result.
Tensor nf4_scale_mean_cpu(Tensor absmax) {
  constexpr const char* kOp = "nf4_scale_mean";
  constexpr int64_t kChunk = 8192;
  const int64_t n = absmax.numel(), chunks = ceil_div(n, kChunk);
  absmax = checked_part(kOp, "absmax", absmax, ScalarType::Float, n);
  const float* in = absmax.const_data_ptr<float>();
  Tensor mean = empty({}, ScalarType::Float);
  float* out = mean.mutable_data_ptr<float>();
  *out = 0.0f;
  if (n == 0) return mean;

  // Magnitudes are compared as integers. The bits of a NaN are greater than the bits of infinity, so that the result is
  // NaN if a scale is NaN.
  std::vector<uint32_t> most(static_cast<size_t>(chunks));
  parallel_for(0, chunks, kDecodeGrain / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      uint32_t largest = 0;
      for (int64_t i = chunk * kChunk; i < min_i64((chunk + 1) * kChunk, n); ++i)
        largest = std::max(largest, float_to_bits(in[i]) & 0x7fffffffu);
      most[static_cast<size_t>(chunk)] = largest;
    }
  });
  const float largest = bits_to_float(*std::max_element(most.begin(), most.end()));
  *out = largest;
  if (largest == 0.0f || !std::isfinite(largest)) return mean;

  int above = 0, length = 0;  // `largest` is below 2^above, and n is below 2^length
  std::frexp(static_cast<double>(largest), &above);
  while (n >> length != 0) ++length;
  const double by = std::ldexp(1.0, 62 - length - above);
  std::vector<int64_t> sums(static_cast<size_t>(chunks));
  parallel_for(0, chunks, kDecodeGrain / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int64_t sum = 0;
      for (int64_t i = chunk * kChunk; i < min_i64((chunk + 1) * kChunk, n); ++i)
        sum += static_cast<int64_t>(static_cast<double>(in[i]) * by);
      sums[static_cast<size_t>(chunk)] = sum;
    }
  });
  int64_t total = 0;
  for (const int64_t sum : sums) total += sum;
  *out = static_cast<float>(static_cast<double>(total) / by / static_cast<double>(n));
  return mean;
}

std::tuple<Tensor, Tensor> nf4_quantize_absmax_cpu(Tensor centred, Tensor code) {
  constexpr const char* kOp = "nf4_quantize_absmax";
  const int64_t n = centred.numel();
  const int64_t groups = ceil_div(n, kNestedBlock);
  centred = checked_part(kOp, "centred", centred, ScalarType::Float, n);
  code = checked_part(kOp, "code", code, ScalarType::Float, 256);
  const NearestScale nearest(code.const_data_ptr<float>());
  Tensor codes = empty({n}, ScalarType::Byte);
  Tensor absmax = empty({groups}, ScalarType::Float);
  const float* in = centred.const_data_ptr<float>();
  uint8_t* out = codes.mutable_data_ptr<uint8_t>();
  float* scales = absmax.mutable_data_ptr<float>();
  parallel_for(0, groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t start = group * kNestedBlock, stop = min_i64(start + kNestedBlock, n);
      uint32_t most = 0;  // magnitudes are compared as integers, so that a NaN is the largest
      for (int64_t i = start; i < stop; ++i) {
        const uint32_t bits = float_to_bits(in[i]) & 0x7fffffffu;
        most = bits > most ? bits : most;
      }
      const float largest = bits_to_float(most);
      scales[group] = largest;
      const float inverse = 1.0f / (largest < kSmallestAbsmax ? kSmallestAbsmax : largest);
      if (inverse > 0.0f)
        nearest.codes(in + start, inverse, stop - start, out + start);
      else
        for (int64_t i = start; i < stop; ++i) out[i] = nearest.code(in[i] * inverse);
    }
  });
  return {codes, absmax};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("nf4_quantize", PEFT_EXT_CPU_BOX(&peft_ext::nf4_quantize_cpu));
  m.impl("nf4_scale_mean", PEFT_EXT_CPU_BOX(&peft_ext::nf4_scale_mean_cpu));
  m.impl("nf4_quantize_absmax", PEFT_EXT_CPU_BOX(&peft_ext::nf4_quantize_absmax_cpu));
}
