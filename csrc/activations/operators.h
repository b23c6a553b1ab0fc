// Declares the CPU functions of the operator gated_activation, for operators that compute a gated activation as one of
// their steps.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/tensor.h"

namespace peft_ext {

Tensor gated_activation_cpu(Tensor gate, std::optional<Tensor> up, int64_t activation);

// cpu_gated_value returns act(gate) ∘ up, and cpu_gated_gradients returns the gradients of gate and up. If up has no
// value, gate holds both operands, and the second gradient has shape [0]. op: the operator that error messages name.
Tensor cpu_gated_value(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation);
std::tuple<Tensor, Tensor> cpu_gated_gradients(const char* op, const Tensor& grad, const Tensor& gate,
                                               const std::optional<Tensor>& up, int64_t activation);

}  // namespace peft_ext
