// Declares rms_norm_cpu, the CPU function of the operator rms_norm, for the operator decoder_layer.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/tensor.h"

namespace peft_ext {

std::tuple<Tensor, Tensor> rms_norm_cpu(Tensor x, std::optional<Tensor> weight, double eps, double offset,
                                        bool round_before_weight);

}  // namespace peft_ext
