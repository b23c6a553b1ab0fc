// Activations, in the order of peft_ext.reference.activation.ACTIVATIONS: the operators take a number, for PyTorch's
// stable ABI leaks each string that an operator takes or is called with.
#pragma once

#include <stdint.h>

namespace peft_ext {

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu, kRelu2 };

constexpr int64_t kActivations = 5;

}  // namespace peft_ext
