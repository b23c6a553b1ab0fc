// The frozen weights of a mixture's experts as kernels find them.
#pragma once

#include "nf4/cuda/nf4.cuh"

namespace peft_ext {

// Frozen weights of all experts: element (column, inner) of expert e is by_expert e + by_column column + by_inner
// inner.
struct StackView {
  const void* dense;                       // or null:
  Nf4View nf4;                             // the first expert's
  int64_t codes, scales, groups;           // from an expert's to the next's: packed bytes, absmax, nested_absmax
  int64_t by_expert, by_column, by_inner;  // elements; of NF4 by_expert is 0
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
