// Host functions for packed weights in the formats of weight/formats/list.h on CUDA.
#pragma once

#include <type_traits>

#include "weight/device_weight.cuh"
#include "weight/formats/list.h"

namespace peft_ext {

// Returns the view of a packed weight, or of the first weight if `weight` holds a stack of weights.
PackedView packed_view(const Launcher& launcher, const DeviceWeight& weight);

// packed_dense decodes a whole weight, and returns [N, K] in `type`. If row_scale is given, row n is multiplied by
// row_scale[n] and rounded once. packed_dense_stack decodes a stack of `count` weights, and returns [count, N, K].
Tensor packed_dense(const DeviceWeight& weight, ScalarType type, const Tensor* row_scale = nullptr);
Tensor packed_dense_stack(const DeviceWeight& weight, ScalarType type, int64_t count);

// Launches packed_few_tokens_kernel for a format and an element type.
struct PackedFew;
void launch_packed_few(const Launcher& launcher, const PackedFew& work, int64_t format, ScalarType type);

namespace {

// Calls f with `number`, the number of a packed format, as a std::integral_constant<int, number>.
template <typename F>
inline void with_format(int64_t number, F f) {
  switch (number) {
#define FORMAT(number, Format) \
  case number:                 \
    return f(std::integral_constant<int, number>());
    PEFT_EXT_FORMATS(FORMAT)
#undef FORMAT
    default:
      STD_TORCH_CHECK(false, "peft_ext: a kernel was asked for the packed format ", number, ", which does not exist");
  }
}

}  // namespace
}  // namespace peft_ext
