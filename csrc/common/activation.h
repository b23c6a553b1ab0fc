// The numbers by which operators name activation functions, in the order of peft_ext.reference.activations.ACTIVATIONS.
// Operators take a number instead of a name, because PyTorch's stable ABI leaks each string argument of an operator.
#pragma once

#include <stdint.h>

namespace peft_ext {

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu, kRelu2 };

constexpr int64_t kActivations = 5;

}  // namespace peft_ext
