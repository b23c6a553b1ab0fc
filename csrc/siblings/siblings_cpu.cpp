// Layers of one input on the CPU, each with LoRA or without. See linear/cpu/adapted_linear.h.
#include <vector>

#include "linear/cpu/adapted_linear.h"

namespace peft_ext {
namespace {

// Layers of one input, of each those of ten tensors (weight, absmax, nested_absmax, nested_code, nested_offset, bias,
// lora_A, lora_B, rank_scale, seed) that it has, four sizes (which these are, as bits; blocksize, N, K) and two numbers
// (scaling, dropout_p).
constexpr size_t kTensors = 10, kSizes = 4, kNumbers = 2;

std::vector<Layer> lora_layers(const char* op, const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes,
                               const std::vector<double>& numbers) {
  const size_t count = sizes.size() / kSizes;
  STD_TORCH_CHECK(sizes.size() == count * kSizes && numbers.size() == count * kNumbers, op, ": ", sizes.size(),
                  " sizes and ", numbers.size(), " numbers, wanted ", kSizes, " and ", kNumbers, " of each layer");
  std::vector<Layer> layers;
  size_t at = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t* size = sizes.data() + i * kSizes;
    std::optional<Tensor> t[kTensors];
    for (size_t j = 0; j < kTensors; ++j) {
      if ((size[0] >> j & 1) == 0) continue;
      STD_TORCH_CHECK(at < tensors.size(), op, ": ", tensors.size(), " tensors are too few");
      t[j] = tensors[at++];
    }
    STD_TORCH_CHECK(t[0].has_value() && t[6].has_value() == t[7].has_value(), op, ": layer ", i,
                    " has no weight, or one of lora_A and lora_B");
    Layer layer{checked_weight(op, *t[0], t[1], t[2], t[3], t[4], size[1], {size[2], size[3]}), t[5], Adapter()};
    if (t[6].has_value())
      layer.adapter = lora_adapter(op, *t[6], *t[7], t[8], numbers[i * kNumbers], numbers[i * kNumbers + 1], t[9]);
    layers.push_back(layer);
  }
  return layers;
}

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
    out.push_back(scale.has_value() ? torch::stable::to(own.grad_rank_scale, scale->scalar_type())
                                    : own.grad_rank_scale);
  }
  return out;
}

}  // namespace
}  // namespace peft_ext

STABLE_TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("lora_linears", TORCH_BOX(&peft_ext::lora_linears_cpu));
  m.impl("lora_linears_backward", TORCH_BOX(&peft_ext::lora_linears_backward_cpu));
}
