// A check of the activation's number that the bottleneck operators of the CPU and of CUDA share.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "common/activation.h"

namespace peft_ext {

// A bottleneck adapter supports the first kBottleneckActivations activations of the enum Activation.
constexpr int64_t kBottleneckActivations = 4;

inline Activation checked_activation(const char* op, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < kBottleneckActivations, op, ": activation is ", activation,
                  ", wanted 0 (gelu), 1 (gelu_tanh), 2 (relu) or 3 (silu)");
  return static_cast<Activation>(activation);
}

}  // namespace peft_ext
