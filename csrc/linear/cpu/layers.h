// The operators' lists as the CPU's layers.
#pragma once

#include <vector>

#include "linear/cpu/adapted_linear.h"
#include "linear/layer_list.h"

namespace peft_ext {

inline std::vector<Layer> lora_layers(const char* op, const std::vector<Tensor>& tensors,
                                      const std::vector<int64_t>& sizes, const std::vector<double>& numbers) {
  std::vector<Layer> layers;
  for (const ListedLayer& from : listed_layers(op, tensors, sizes, numbers)) {
    Layer layer{checked_weight(op, from.weight, from.absmax, from.nested_absmax, from.nested_code, from.nested_offset,
                               from.blocksize, from.shape),
                from.bias, Adapter()};
    if (from.lora_A.has_value())
      layer.adapter =
          lora_adapter(op, *from.lora_A, *from.lora_B, from.rank_scale, from.scaling, from.dropout_p, from.seed);
    layers.push_back(layer);
  }
  return layers;
}

}  // namespace peft_ext
