// Reads the list arguments of operators that compute several layers in one call.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <stdint.h>

#include <optional>
#include <vector>

namespace peft_ext {

// One of the layers that the list arguments of an operator describe. A layer whose lora_A is missing has no adapter.
struct ListedLayer {
  torch::stable::Tensor weight;
  std::optional<torch::stable::Tensor> part1, part2, part3, part4, bias, lora_A, lora_B, rank_scale, seed;
  int64_t layout = 0;
  std::vector<int64_t> shape;  // [N, K]
  double scaling = 1.0, dropout_p = 0.0;
};

// Reads the layers of an operator's list arguments. tensors: for one layer after the other, those tensors of
// ListedLayer that the layer has, in the order of their declaration in ListedLayer. sizes: four numbers for each layer,
// which are a bit mask of the tensors that the layer has, layout, N and K. numbers: scaling and dropout_p of each
// layer.
inline std::vector<ListedLayer> listed_layers(const char* op, const std::vector<torch::stable::Tensor>& tensors,
                                              const std::vector<int64_t>& sizes, const std::vector<double>& numbers) {
  constexpr size_t kTensors = 10, kSizes = 4, kNumbers = 2;
  const size_t count = sizes.size() / kSizes;
  STD_TORCH_CHECK(sizes.size() == count * kSizes && numbers.size() == count * kNumbers, op, ": ", sizes.size(),
                  " sizes and ", numbers.size(), " numbers, wanted ", kSizes, " and ", kNumbers, " of each layer");
  std::vector<ListedLayer> layers(count);
  size_t at = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t* size = sizes.data() + i * kSizes;
    ListedLayer& layer = layers[i];
    std::optional<torch::stable::Tensor> weight;
    std::optional<torch::stable::Tensor>* const held[kTensors] = {
        &weight,     &layer.part1,  &layer.part2,  &layer.part3,      &layer.part4,
        &layer.bias, &layer.lora_A, &layer.lora_B, &layer.rank_scale, &layer.seed};
    for (size_t j = 0; j < kTensors; ++j) {
      if ((size[0] >> j & 1) == 0) continue;
      STD_TORCH_CHECK(at < tensors.size(), op, ": ", tensors.size(), " tensors are too few");
      *held[j] = tensors[at++];
    }
    STD_TORCH_CHECK(weight.has_value() && layer.lora_A.has_value() == layer.lora_B.has_value(), op, ": layer ", i,
                    " has no weight, or one of lora_A and lora_B");
    layer.weight = *weight;
    layer.layout = size[1];
    layer.shape = {size[2], size[3]};
    layer.scaling = numbers[i * kNumbers];
    layer.dropout_p = numbers[i * kNumbers + 1];
  }
  return layers;
}

}  // namespace peft_ext
