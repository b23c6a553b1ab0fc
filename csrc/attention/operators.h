// Declares what the operator decoder_layer uses of the CPU code of attention, besides the kernels (kernels.h).
#pragma once

#include "attention/kernels.h"
#include "cpu/tensor.h"

namespace peft_ext {

// Raises an error unless the mask is of bools [B or 1, H or 1, queries or 1, keys or 1] for the sizes in `work`, and
// makes the kernel for few queries read the mask in place.
void set_seen(const char* op, const Tensor& mask, Attention* work);

}  // namespace peft_ext
