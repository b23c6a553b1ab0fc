// Declares the functions that compute a gated activation on CUDA, for operators of which a gated activation is a
// step, and the functions that make the argument of a kernel. activations_cuda.cpp defines the functions.
#pragma once

#include "activations/activations.cuh"
#include "activations/glue.h"
#include "cuda/tensor.cuh"

namespace peft_ext {

// Returns the operands gate and up as RowsApart objects, and the sizes of the result. If `halves`, the argument `gate`
// is a tensor [..., 2F] whose first half is gate and whose second half is up. Otherwise gate is [..., F], and up is
// [..., F] or has no value.
Parts gated_parts(const char* op, const Tensor& gate, const std::optional<Tensor>& up, bool halves);

// The gradients of the operands gate and up. If the call has no tensor up, `up` is [0]; if one tensor holds both
// operands, `gate` holds both gradients.
struct GatedGradients {
  Tensor gate, up;
};
GatedGradients empty_gated_gradients(const Tensor& gate, const std::optional<Tensor>& up);

// gated_value_work and gated_gradient_work return the argument of a kernel that writes y, or the gradients `out` from
// the gradient dy of y.
GatedWork gated_value_work(const Launcher& launcher, const Parts& parts, Activation activation, const Tensor& y);
GatedWork gated_gradient_work(const Launcher& launcher, const Parts& parts, Activation activation, const RowsApart& dy,
                              const GatedGradients& out);

// gated_value returns act(gate) ∘ up, and gated_gradients returns the gradients, each by one launch. If up has no
// value, gate holds both operands.
Tensor gated_value(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation);
GatedGradients gated_gradients(const char* op, const Tensor& grad, const Tensor& gate, const std::optional<Tensor>& up,
                               int64_t activation);

}  // namespace peft_ext
