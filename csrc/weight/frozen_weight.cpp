// Checks the arguments of a frozen weight on the CPU. See frozen_weight.h.
#include "weight/frozen_weight.h"

namespace peft_ext {

int64_t checked_numel(const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "peft_ext: shape has ", size, ", wanted sizes of 0 and more");
    numel = checked_product(numel, size);
  }
  return numel;
}

void check_blocksize(const char* op, int64_t blocksize) {
  STD_TORCH_CHECK(is_blocksize(blocksize), op, ": blocksize is ", blocksize, ", wanted a power of two from ",
                  kSmallestBlock, " to ", kLargestBlock);
}

Tensor checked_part(const char* op, const char* argument, const Tensor& tensor, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == numel, op, ": ", argument, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), " with ", tensor.numel(), " elements, wanted ",
                  torch::headeronly::toString(type), " with ", numel);
  return as_contiguous(tensor);
}

FrozenWeight checked_weight(const char* op, Tensor weight, std::optional<Tensor> absmax,
                            std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                            std::optional<Tensor> nested_offset, int64_t blocksize, std::vector<int64_t> shape) {
  FrozenWeight held{weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape};
  if (!held.is_nf4()) {
    STD_TORCH_CHECK(weight.dim() == 2, op, ": weight has ", weight.dim(), " dimensions, wanted 2");
    held.shape.assign(weight.sizes().begin(), weight.sizes().end());
    return held;
  }
  check_blocksize(op, blocksize);
  const int64_t n = checked_numel(shape), blocks = ceil_div(n, blocksize);
  held.weight = checked_part(op, "weight", weight, ScalarType::Byte, ceil_div(n, 2));
  const bool nested = nested_absmax.has_value();
  held.absmax = checked_part(op, "absmax", *absmax, nested ? ScalarType::Byte : ScalarType::Float, blocks);
  if (nested) {
    STD_TORCH_CHECK(nested_code.has_value() && nested_offset.has_value(), op,
                    ": nested_absmax is given without nested_code and nested_offset");
    held.nested_absmax =
        checked_part(op, "nested_absmax", *nested_absmax, ScalarType::Float, ceil_div(blocks, kNestedBlock));
    held.nested_code = checked_part(op, "nested_code", *nested_code, ScalarType::Float, 256);
    held.nested_offset = checked_part(op, "nested_offset", *nested_offset, ScalarType::Float, 1);
  }
  return held;
}

void check_matrix_weight(const char* op, const FrozenWeight& weight, ScalarType type) {
  STD_TORCH_CHECK(weight.shape.size() == 2, op, ": weight has ", weight.shape.size(), " dimensions, wanted [N, K]");
  STD_TORCH_CHECK(weight.is_nf4() || weight.weight.scalar_type() == type, op, ": weight is ",
                  torch::headeronly::toString(weight.weight.scalar_type()), ", wanted ",
                  torch::headeronly::toString(type));
}

}  // namespace peft_ext
