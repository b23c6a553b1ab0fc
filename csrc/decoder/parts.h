// The CPU functions of other operators, which the operator decoder_layer calls one after another.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "linear/cpu/adapted_linear.h"

namespace peft_ext {

// norm/norm_cpu.cpp
std::tuple<Tensor, Tensor> rms_norm_cpu(Tensor x, std::optional<Tensor> weight, double eps, double offset,
                                        bool round_before_weight);
// rotary/rotary_cpu.cpp: writes the rotated q and k to y_q and y_k.
void rotate_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                  const Tensor& y_q, const Tensor& y_k, bool back);
// attention/attention_cpu.cpp
std::tuple<Tensor, Tensor> scaled_dot_product_attention_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                                                            bool is_causal, double scale, double dropout_p,
                                                            std::optional<Tensor> seed, std::optional<Tensor> bias);
// activations/activations_cpu.cpp
Tensor gated_activation_cpu(Tensor gate, std::optional<Tensor> up, int64_t activation);
// siblings/siblings_cpu.cpp
std::vector<Layer> lora_layers(const char* op, const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes,
                               const std::vector<double>& numbers);

}  // namespace peft_ext
