// The product of few tokens and a packed weight, x Wᵀ: selects a kernel, prepares x, and divides the rows of W among
// the threads.
#include "packed/cpu/skinny.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "packed/cpu/decode.h"
#include "packed/cpu/few_tokens_kernels.h"

namespace peft_ext {
namespace {

struct SkinnyKernel {
  void (*run)(const Nf4Skinny& work, int64_t begin, int64_t end);
  int64_t tokens;  // largest number of tokens that the kernel accepts; 0: there is no kernel
  // For kernels that read x in bfloat16: permutes a row of x to the kernel's order, `group` columns at a time. `order`
  // is null for kernels that read x in float32.
  void (*order)(const bf16* x, int64_t columns, bf16* out) = nullptr;
  int64_t group = 1;
};

SkinnyKernel skinny_kernel(bool bf16_x) {
#if defined(__x86_64__)
  if (bf16_x && current_isa() >= Isa::kAvx512Bf16)
    return {nf4_skinny_bf16_avx512, kSkinnyTokensBf16, nf4_nibble_order, kNibbleGroup};
#elif defined(PEFT_EXT_ARM_BF16)
  if (bf16_x && current_isa() == Isa::kNeonBf16)
    return {nf4_skinny_bf16_neon, nf4_kernels().skinny_tokens, nf4_order_bf16_neon, kSkinnyStep};
#endif
  return {nf4_kernels().skinny, nf4_kernels().skinny_tokens};
}

// Largest number of W's rows that a kernel for NF4 multiplies at a time. If the weight is double-quantized, a thread's
// rows are divided into chunks (skinny_chunk) of a multiple of kRowsTogether rows, except for the thread's last chunk.
constexpr int64_t kRowsTogether = 4;

// Returns the number of rows of a double-quantized NF4 weight whose scales are decoded at a time.
int64_t skinny_chunk(const FrozenWeight& weight) {
  const int64_t rows = kScaleChunk * weight.blocksize() / weight.in_features();
  return std::max<int64_t>(1, rows / kRowsTogether) * kRowsTogether;
}

// Returns the kernels of few_tokens_kernels.h that accept the weight and x of dtype `type`, or null pointers.
FewTokensKernels few_tokens_kernels(const FrozenWeight& weight, ScalarType type) {
#if defined(__x86_64__)
  if (type == ScalarType::BFloat16 && current_isa() >= Isa::kAvx512Bf16) {
    const int number = static_cast<int>(format_number(weight.layout));
    const PackedView view = view_of(weight);
    for (const auto find : {row_kernels_avx512_bf16, gguf_kernels_avx512_bf16, panel_kernels_avx512_bf16})
      if (const FewTokensKernels found = find(number, view); found.multiply != nullptr) return found;
  }
#endif
  return {};
}

// Does the work of skinny_parts for a format other than NF4.
FewTokensProduct format_parts(const Tensor& x, const FrozenWeight& weight) {
  const int64_t k = weight.in_features(), n = weight.out_features(), tokens = x.size(0);
  FewTokensProduct product;
  product.y = empty({tokens, n}, ScalarType::Float);
  float* to = product.y.mutable_data_ptr<float>();
  const PackedView view = view_of(weight);
  if (const FewTokensKernels few = few_tokens_kernels(weight, x.scalar_type()); few.multiply != nullptr) {
    const int64_t columns = ordered_columns(k);
    const Tensor ordered = empty({tokens, columns}, ScalarType::BFloat16);
    const Tensor sums = empty({tokens, columns / 16}, ScalarType::Float);
    auto* held = static_cast<bf16*>(ordered.mutable_data_ptr());
    few.order(static_cast<const bf16*>(x.const_data_ptr()), tokens, k, held, sums.mutable_data_ptr<float>());
    product.units = few.units;
    product.work = ceil_div(n * k * tokens, few.units);
    product.by_rows = few.units == n;
    product.multiply = [=, from = sums.const_data_ptr<float>()](int64_t begin, int64_t end) {
      few.multiply(view, held, from, tokens, to, begin, end);
    };
    product.held = {ordered, sums};
    return product;
  }
  const FormatKernels& kernels = format_kernels(weight.layout);
  const Tensor wide = as_contiguous(as_type(x, ScalarType::Float));
  product.units = n;
  product.work = k * tokens;
  product.multiply = [=, &kernels, from = wide.const_data_ptr<float>()](int64_t begin, int64_t end) {
    kernels.few_tokens(view, from, tokens, to, begin, end);
  };
  product.held = {wide};
  return product;
}

}  // namespace

bool skinny_accepts(const FrozenWeight& weight, ScalarType type, int64_t tokens) {
  if (!weight.is_packed()) return false;
  if (!weight.is_nf4()) {
    if (weight.in_features() == 0 || weight.out_features() == 0) return false;
    if (tokens <= kMostFewTokens && few_tokens_kernels(weight, type).multiply != nullptr) return true;
    return tokens <= kFormatFewTokens && format_kernels(weight.layout).has_few_tokens(view_of(weight));
  }
  return tokens <= skinny_kernel(type == ScalarType::BFloat16).tokens && weight.blocksize() % kSkinnyStep == 0 &&
         weight.in_features() % kSkinnyStep == 0 && weight.in_features() > 0;
}

FewTokensProduct skinny_parts(const char* op, const Tensor& x, const FrozenWeight& weight) {
  const int64_t k = weight.in_features(), n = weight.out_features(), tokens = x.size(0);
  if (!weight.is_nf4()) return format_parts(x, weight);
  const SkinnyKernel kernel = skinny_kernel(x.scalar_type() == ScalarType::BFloat16);
  FewTokensProduct product;
  product.y = empty({tokens, n}, ScalarType::Float);
  Nf4Skinny work;
  work.packed = weight.weight.const_data_ptr<uint8_t>();
  work.block_shift = __builtin_ctzll(static_cast<unsigned long long>(weight.blocksize()));
  work.columns = k;
  work.rows = n;
  work.dtype = dtype_of(op, "x", x);
  work.tokens = tokens;
  work.x = nullptr;
  work.x_ordered = nullptr;
  Tensor held;
  if (kernel.order != nullptr) {
    const int64_t columns = ceil_div(k, kernel.group) * kernel.group;
    held = empty({tokens, columns}, ScalarType::BFloat16);
    auto* out = static_cast<bf16*>(held.mutable_data_ptr());
    const auto* in = static_cast<const bf16*>(x.const_data_ptr());
    for (int64_t t = 0; t < tokens; ++t) kernel.order(in + t * k, k, out + t * columns);
    work.x_ordered = out;
  } else {
    held = as_contiguous(as_type(x, ScalarType::Float));
    work.x = held.const_data_ptr<float>();
  }
  work.y = product.y.mutable_data_ptr<float>();
  // With double quantization, the loop decodes the scales of about kScaleChunk blocks at a time, and the kernel
  // multiplies the rows of these blocks. Without double quantization, the kernel multiplies all rows of the thread's
  // part at once.
  const bool nested = nested_scales(weight) > 0;
  const int64_t chunk = nested ? skinny_chunk(weight) : n, blocksize = weight.blocksize();
  const size_t room = nested ? static_cast<size_t>(chunk * k / blocksize + 2) : 0;
  product.units = n;
  product.work = k * tokens;
  product.multiply = [=, scales = Scales(weight)](int64_t begin, int64_t end) {
    std::vector<float> buffer(room);
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t last = min_i64(first + chunk, end);
      Nf4Skinny part = work;
      part.absmax = scales.decode(first * k / blocksize, ceil_div(last * k, blocksize), buffer.data());
      kernel.run(part, first, last);
    }
  };
  product.held = {held};
  return product;
}

Tensor skinny_product(const char* op, const Tensor& x, const FrozenWeight& weight) {
  const FewTokensProduct product = skinny_parts(op, x, weight);
  parallel_for(0, product.units, ceil_div(kDecodeGrain, product.work), product.multiply);
  return product.y;
}

}  // namespace peft_ext
