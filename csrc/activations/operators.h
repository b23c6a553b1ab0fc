// Declares the CPU function of the operator gated_activation, for the operator decoder_layer.
#pragma once

#include <optional>

#include "cpu/tensor.h"

namespace peft_ext {

Tensor gated_activation_cpu(Tensor gate, std::optional<Tensor> up, int64_t activation);

}  // namespace peft_ext
