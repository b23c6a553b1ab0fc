// Declares the CPU functions of the operator gated_activation, for operators that compute a gated activation as one of
// their steps.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/tensor.h"

namespace peft_ext {

Tensor gated_activation_cpu(Tensor gate, std::optional<Tensor> up, int64_t activation);
std::tuple<Tensor, Tensor> gated_activation_backward_cpu(Tensor grad, Tensor gate, std::optional<Tensor> up,
                                                         int64_t activation);

}  // namespace peft_ext
