// The frozen weights of all experts of a mixture as an argument of kernels.
#pragma once

#include "nf4/cuda/nf4.cuh"

namespace peft_ext {

// Element (column of the result, summed index inner) of expert e's weight is at the index by_expert e + by_column
// column + by_inner inner.
struct StackView {
  const void* dense;  // the dense weights; null for NF4
  Nf4View nf4;        // NF4 weight of expert 0
  // distances from one expert to the next: bytes of codes, elements of absmax, elements of nested_absmax
  int64_t codes, scales, groups;
  int64_t by_expert, by_column, by_inner;  // strides of W in elements; by_expert is 0 for NF4
};

__device__ __forceinline__ Nf4View nf4_of_expert(const StackView& weight, int64_t expert) {
  Nf4View own = weight.nf4;
  own.packed += expert * weight.codes;
  if (own.nested_absmax != nullptr) {
    own.absmax = static_cast<const uint8_t*>(own.absmax) + expert * weight.scales;
    own.nested_absmax += expert * weight.groups;
    own.nested_offset += expert;
  } else {
    own.absmax = static_cast<const float*>(own.absmax) + expert * weight.scales;
  }
  return own;
}

}  // namespace peft_ext
