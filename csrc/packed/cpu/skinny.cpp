// The product of few tokens and a packed weight, x Wᵀ: selects a kernel, prepares x, and divides the rows of W among
// the threads.
#include "packed/cpu/skinny.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/scratch.h"
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

constexpr int64_t kAlignment = 64;  // bytes; the memory that FewTokensProduct::order writes begins at a multiple

// Does the work of skinny_parts for a format other than NF4.
FewTokensProduct format_parts(ScalarType type, int64_t tokens, const FrozenWeight& weight) {
  const int64_t k = weight.in_features(), n = weight.out_features();
  FewTokensProduct product;
  const PackedView view = view_of(weight);
  if (const FewTokensKernels few = few_tokens_kernels(weight, type); few.multiply != nullptr) {
    const int64_t columns = ordered_columns(k);
    // `order` writes the ordered x, and behind it the sums of x that the kernels read.
    const int64_t ordered = ceil_div(tokens * columns * static_cast<int64_t>(sizeof(bf16)), kAlignment) * kAlignment;
    product.room = ordered + tokens * (columns / 16) * static_cast<int64_t>(sizeof(float));
    product.order = [=](const void* x, void* room) {
      auto* sums = reinterpret_cast<float*>(static_cast<char*>(room) + ordered);
      few.order(static_cast<const bf16*>(x), tokens, k, static_cast<bf16*>(room), sums);
    };
    product.units = few.units;
    product.work = ceil_div(n * k * tokens, few.units);
    product.by_rows = few.units == n;
    product.multiply = [=](const void* x, float* y, int64_t begin, int64_t end) {
      const auto* sums = reinterpret_cast<const float*>(static_cast<const char*>(x) + ordered);
      few.multiply(view, static_cast<const bf16*>(x), sums, tokens, y, begin, end);
    };
    return product;
  }
  const FormatKernels& kernels = format_kernels(weight.layout);
  product.units = n;
  product.work = k * tokens;
  product.wide = true;
  product.multiply = [=, &kernels](const void* x, float* y, int64_t begin, int64_t end) {
    kernels.few_tokens(view, static_cast<const float*>(x), tokens, y, begin, end);
  };
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

FewTokensProduct skinny_parts(const char* op, ScalarType type, int64_t tokens, const FrozenWeight& weight) {
  if (!weight.is_nf4()) return format_parts(type, tokens, weight);
  const int64_t k = weight.in_features(), n = weight.out_features();
  const SkinnyKernel kernel = skinny_kernel(type == ScalarType::BFloat16);
  FewTokensProduct product;
  Nf4Skinny work{};
  work.packed = weight.weight.const_data_ptr<uint8_t>();
  work.block_shift = __builtin_ctzll(static_cast<unsigned long long>(weight.blocksize()));
  work.columns = k;
  work.rows = n;
  work.dtype = dtype_of(op, "x", type);
  work.tokens = tokens;
  const bool ordered = kernel.order != nullptr;
  product.wide = !ordered;
  if (ordered) {
    const int64_t columns = ceil_div(k, kernel.group) * kernel.group;
    product.room = tokens * columns * static_cast<int64_t>(sizeof(bf16));
    product.order = [=](const void* x, void* room) {
      const auto* in = static_cast<const bf16*>(x);
      auto* out = static_cast<bf16*>(room);
      for (int64_t t = 0; t < tokens; ++t) kernel.order(in + t * k, k, out + t * columns);
    };
  }
  // With double quantization, the loop decodes the scales of about kScaleChunk blocks at a time, and the kernel
  // multiplies the rows of these blocks. Without double quantization, the kernel multiplies all rows of the thread's
  // part at once.
  const bool nested = nested_scales(weight) > 0;
  const int64_t chunk = nested ? skinny_chunk(weight) : n, blocksize = weight.blocksize();
  const size_t room = nested ? static_cast<size_t>(chunk * k / blocksize + 2) * sizeof(float) : 0;
  product.units = n;
  product.work = k * tokens;
  product.multiply = [=, scales = Scales(weight)](const void* x, float* y, int64_t begin, int64_t end) {
    auto* buffer = nested ? static_cast<float*>(scratch(Scratch::kRows, room)) : nullptr;
    Nf4Skinny part = work;
    part.x = ordered ? nullptr : static_cast<const float*>(x);
    part.x_ordered = ordered ? static_cast<const bf16*>(x) : nullptr;
    part.y = y;
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t last = min_i64(first + chunk, end);
      part.absmax = scales.decode(first * k / blocksize, ceil_div(last * k, blocksize), buffer);
      scales.prefetch(last * k / blocksize, ceil_div(min_i64(last + chunk, end) * k, blocksize));
      kernel.run(part, first, last);
    }
  };
  return product;
}

Tensor skinny_product(const char* op, const Tensor& x, const FrozenWeight& weight) {
  const FewTokensProduct product = skinny_parts(op, x.scalar_type(), x.size(0), weight);
  const Tensor y = empty({x.size(0), weight.out_features()}, ScalarType::Float);
  const Tensor held = product.wide ? as_contiguous(as_type(x, ScalarType::Float)) : x;
  const void* from = held.const_data_ptr();
  Tensor room;
  if (product.order) {
    room = empty({product.room}, ScalarType::Byte);
    product.order(from, room.mutable_data_ptr());
    from = room.const_data_ptr();
  }
  parallel_for(0, product.units, ceil_div(kDecodeGrain, product.work),
               [&](int64_t begin, int64_t end) { product.multiply(from, y.mutable_data_ptr<float>(), begin, end); });
  return y;
}

}  // namespace peft_ext
