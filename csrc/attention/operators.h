// The CPU function of attention that the operator decoder_layer calls.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/tensor.h"

namespace peft_ext {

std::tuple<Tensor, Tensor> scaled_dot_product_attention_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                                                            bool is_causal, double scale, double dropout_p,
                                                            std::optional<Tensor> seed, std::optional<Tensor> bias);

}  // namespace peft_ext
