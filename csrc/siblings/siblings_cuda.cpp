// The operator lora_linears on CUDA: several linear layers of one input x, each with or without LoRA, Y_i = x W_iᵀ +
// (x̃_i A_iᵀ ∘ ρ_i) B_iᵀ + b_i with x̃_i = dropout(x) and the scaling ρ_i of each rank. See
// linear/cuda/adapted_linear.cuh.
#include <vector>

#include "linear/cuda/adapted_linear.cuh"
#include "linear/layer_list.h"

namespace peft_ext {
namespace {

std::vector<DeviceLayer> lora_layers(const char* op, const Tensor& x, const std::vector<Tensor>& tensors,
                                     const std::vector<int64_t>& sizes, const std::vector<double>& numbers) {
  std::vector<DeviceLayer> layers;
  for (const ListedLayer& from : listed_layers(op, tensors, sizes, numbers)) {
    DeviceLayer layer{device_weight(op, from.weight, {from.part1, from.part2, from.part3, from.part4}, from.layout,
                                    from.shape, x.scalar_type()),
                      from.bias, DeviceAdapter()};
    if (from.lora_A.has_value())
      layer.adapter =
          lora_device_adapter(op, *from.lora_A, *from.lora_B, from.rank_scale, from.scaling, from.dropout_p, from.seed);
    layers.push_back(layer);
  }
  return layers;
}

std::vector<Tensor> lora_linears_cuda(const Tensor& x, const std::vector<Tensor>& tensors,
                                      const std::vector<int64_t>& sizes, const std::vector<double>& numbers) {
  constexpr const char* kOp = "lora_linears";
  std::vector<Tensor> out, s;
  for (const DeviceForward& found : adapted_forwards(kOp, x, lora_layers(kOp, x, tensors, sizes, numbers))) {
    out.push_back(found.y);
    s.push_back(found.s);
  }
  out.insert(out.end(), s.begin(), s.end());
  return out;
}

std::vector<Tensor> lora_linears_backward_cuda(const std::vector<std::optional<Tensor>>& grads, const Tensor& x,
                                               const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes,
                                               const std::vector<double>& numbers, const std::vector<Tensor>& s,
                                               bool needs_grad_x) {
  constexpr const char* kOp = "lora_linears_backward";
  const std::vector<DeviceLayer> layers = lora_layers(kOp, x, tensors, sizes, numbers);
  const DeviceSiblingsBackward found = adapted_backwards(kOp, grads, x, layers, s, needs_grad_x);
  std::vector<Tensor> out{found.grad_x};
  for (size_t i = 0; i < layers.size(); ++i) {
    const DeviceBackward& own = found.layers[i];
    const std::optional<Tensor>& scale = layers[i].adapter.rank_scale;
    out.push_back(own.grad_A);
    out.push_back(own.grad_B);
    const bool scaled = scale.has_value() && own.grad_rank_scale.numel() > 0;
    out.push_back(scaled ? as_type(own.grad_rank_scale, scale->scalar_type()) : own.grad_rank_scale);
  }
  return out;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("lora_linears", PEFT_EXT_CUDA_BOX(&peft_ext::lora_linears_cuda));
  m.impl("lora_linears_backward", PEFT_EXT_CUDA_BOX(&peft_ext::lora_linears_backward_cuda));
}
