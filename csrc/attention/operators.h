// Declares the CPU function of the operator scaled_dot_product_attention, for the operator decoder_layer.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/tensor.h"

namespace peft_ext {

std::tuple<Tensor, Tensor> scaled_dot_product_attention_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                                                            bool is_causal, double scale, double dropout_p,
                                                            std::optional<Tensor> seed, std::optional<Tensor> bias);

}  // namespace peft_ext
