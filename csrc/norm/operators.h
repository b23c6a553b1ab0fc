// The CPU functions of the norm operators that the operator decoder_layer calls.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/tensor.h"

namespace peft_ext {

std::tuple<Tensor, Tensor> rms_norm_cpu(Tensor x, std::optional<Tensor> weight, double eps, double offset,
                                        bool round_before_weight);

}  // namespace peft_ext
