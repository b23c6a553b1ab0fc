// The activations of a bottleneck adapter, in the order of peft_ext.reference.bottleneck.ACTIVATIONS: the operators
// take a number, for PyTorch's stable ABI leaks each string that an operator takes or is called with.
#pragma once

#include <stdint.h>

namespace peft_ext {

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu };

constexpr int64_t kActivations = 4;

}  // namespace peft_ext
