// Reads the layers of an operator that computes several layers of one input.
#pragma once

#include <vector>

#include "linear/cpu/adapted_linear.h"

namespace peft_ext {

// Returns the layers that an operator's list arguments describe; see listed_layers in linear/layer_list.h.
std::vector<Layer> lora_layers(const char* op, const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes,
                               const std::vector<double>& numbers);

}  // namespace peft_ext
