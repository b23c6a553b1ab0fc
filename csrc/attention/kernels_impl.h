// The attention kernels of attention/kernels.h for one instruction set. Include this file after the headers of the
// instruction set: the target pragma (cpu/target_<isa>.h), Vec (cpu/simd_<isa>.h), words (words_f32.h or words_bf16.h),
// transposition (transpose_<isa>.h) and product (product.h or product_amx.h).
#pragma once

#include "attention/backward.h"
#include "attention/few.h"

namespace peft_ext {
namespace {

// Calls f with a zero whose C++ type is the element type that `dtype` names, for the types that this path supports.
template <typename F>
inline void with_element(DType dtype, F f) {
  if constexpr (kWord == 2)
    f(bf16{});
  else
    with_dtype(dtype, f);
}

void pack(const Attention& work, int64_t begin, int64_t end, void* scratch) {
  with_element(work.dtype, [&](auto zero) { pack_units<decltype(zero)>(work, begin, end, scratch); });
}

size_t pack_scratch(const Attention& work) {
  Parts parts{0};
  PackParts(&parts, work.size > work.value_size ? work.size : work.value_size);
  return parts.at;
}

void forward(const Attention& work, ForwardUnit unit, void* scratch) {
  [[maybe_unused]] const ProductUnit products{};
  with_element(work.dtype, [&](auto zero) {
    forward_block<decltype(zero)>(work, unit.head / work.heads, unit.head % work.heads, unit.block * kQueries,
                                  {reinterpret_cast<uintptr_t>(scratch)});
  });
}

size_t forward_scratch(const Attention& work) {
  Parts parts{0};
  ForwardParts(&parts, work);
  return parts.at;
}

void few(const Attention& work, int64_t begin, int64_t end, void* scratch) {
  with_element(work.dtype, [&](auto zero) { few_units<decltype(zero)>(work, begin, end, scratch); });
}

size_t few_scratch(const Attention& work) {
  Parts parts{0};
  FewParts(&parts, work);
  return parts.at;
}

void backward(const Attention& work, const BackwardCell& cell, void* scratch) {
  [[maybe_unused]] const ProductUnit products{};
  with_element(work.dtype, [&](auto zero) { backward_cell<decltype(zero)>(work, cell, scratch); });
}

size_t backward_scratch(const Attention& work) {
  Parts parts{0};
  parts.take<float>(work.size * kQueries);
  BackwardParts(&parts, work);
  return parts.at;
}

void finish(const Attention& work, int64_t begin, int64_t end) {
  with_element(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    finish_rows<T>(work, work.grad_k, work.key_sums, work.size, work.scale, begin, end);
    finish_rows<T>(work, work.grad_v, work.value_sums, work.value_size, work.dropout.scale, begin, end);
  });
}

constexpr AttentionKernels kTable = {kWord == 2 ? DType::kBF16 : DType::kF32,
                                     kLeftRows,
                                     kDepth,
                                     kInPlace,
                                     kWidth,
                                     pack,
                                     pack_scratch,
                                     forward,
                                     forward_scratch,
                                     few,
                                     few_scratch,
                                     backward,
                                     backward_scratch,
                                     finish};

}  // namespace
}  // namespace peft_ext
