// The operator lora_linears on the CPU: several linear layers of one input x, each with or without LoRA, Y_i = x W_iᵀ +
// (x̃_i A_iᵀ ∘ ρ_i) B_iᵀ + b_i with x̃_i = dropout(x) and the scaling ρ_i of each rank. See
// linear/cpu/adapted_linear.h.
#include <vector>

#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/adapted_linear.h"
#include "linear/layer_list.h"
#include "siblings/layers.h"

namespace peft_ext {

std::vector<Layer> lora_layers(const char* op, const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes,
                               const std::vector<double>& numbers) {
  std::vector<Layer> layers;
  for (const ListedLayer& from : listed_layers(op, tensors, sizes, numbers)) {
    Layer layer{
        checked_weight(op, from.weight, {from.part1, from.part2, from.part3, from.part4}, from.layout, from.shape),
        from.bias, Adapter()};
    if (from.lora_A.has_value())
      layer.adapter =
          lora_adapter(op, *from.lora_A, *from.lora_B, from.rank_scale, from.scaling, from.dropout_p, from.seed);
    layers.push_back(layer);
  }
  return layers;
}

namespace {

std::vector<Tensor> lora_linears_cpu(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> sizes,
                                     std::vector<double> numbers) {
  constexpr const char* kOp = "lora_linears";
  const std::vector<AdaptedForward> found = adapted_forwards(kOp, x, lora_layers(kOp, tensors, sizes, numbers));
  std::vector<Tensor> out;
  for (const AdaptedForward& one : found) out.push_back(one.y);
  for (const AdaptedForward& one : found) out.push_back(one.s);
  return out;
}

std::vector<Tensor> lora_linears_backward_cpu(std::vector<std::optional<Tensor>> grads, Tensor x,
                                              std::vector<Tensor> tensors, std::vector<int64_t> sizes,
                                              std::vector<double> numbers, std::vector<Tensor> s, bool needs_grad_x) {
  constexpr const char* kOp = "lora_linears_backward";
  const std::vector<Layer> layers = lora_layers(kOp, tensors, sizes, numbers);
  const SiblingsBackward found = adapted_backwards(kOp, grads, x, layers, s, needs_grad_x);
  std::vector<Tensor> out{found.grad_x};
  for (size_t i = 0; i < layers.size(); ++i) {
    const AdaptedBackward& own = found.layers[i];
    const std::optional<Tensor>& scale = layers[i].adapter.rank_scale;
    out.push_back(own.grad_A);
    out.push_back(own.grad_B);
    out.push_back(scale.has_value() ? as_type(own.grad_rank_scale, scale->scalar_type()) : own.grad_rank_scale);
  }
  return out;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("lora_linears", PEFT_EXT_CPU_BOX(&peft_ext::lora_linears_cpu));
  m.impl("lora_linears_backward", PEFT_EXT_CPU_BOX(&peft_ext::lora_linears_backward_cpu));
}
