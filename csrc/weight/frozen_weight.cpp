// Checks the tensors, the layout and the shape that an operator on the CPU gets for a frozen weight. See
// frozen_weight.h.
#include "weight/frozen_weight.h"

#include "weight/format_check.h"

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

namespace {

void check_nf4(const char* op, FrozenWeight* held) {
  check_blocksize(op, held->layout);
  STD_TORCH_CHECK(held->parts[0].has_value(), op, ": absmax is None, wanted the scales of an NF4 weight");
  const int64_t n = checked_numel(held->shape), blocks = ceil_div(n, held->layout);
  held->weight = checked_part(op, "weight", held->weight, ScalarType::Byte, ceil_div(n, 2));
  const bool nested = held->parts[1].has_value();
  held->parts[0] = checked_part(op, "absmax", *held->parts[0], nested ? ScalarType::Byte : ScalarType::Float, blocks);
  if (!nested) return;
  STD_TORCH_CHECK(held->parts[2].has_value() && held->parts[3].has_value(), op,
                  ": nested_absmax is given without nested_code and nested_offset");
  held->parts[1] =
      checked_part(op, "nested_absmax", *held->parts[1], ScalarType::Float, ceil_div(blocks, kNestedBlock));
  held->parts[2] = checked_part(op, "nested_code", *held->parts[2], ScalarType::Float, 256);
  held->parts[3] = checked_part(op, "nested_offset", *held->parts[3], ScalarType::Float, 1);
}

// Checks the sizes of the parts of a weight in one of the formats of weight/formats/list.h.
void check_packed(const char* op, FrozenWeight* held) {
  checked_numel(held->shape);
  STD_TORCH_CHECK(held->shape.size() == 2, op, ": weight has ", held->shape.size(), " dimensions, wanted [N, K]");
  check_format(
      op, held->layout, 1, held->shape[0], held->shape[1], "the CPU",
      [&](int part) { return part == 0 ? held->weight : held->parts[static_cast<size_t>(part - 1)]; },
      [](const Tensor& tensor) { return tensor.is_cpu(); });
  held->weight = as_contiguous(held->weight);
  for (std::optional<Tensor>& part : held->parts)
    if (part.has_value()) part = as_contiguous(*part);
}

}  // namespace

FrozenWeight checked_weight(const char* op, Tensor weight, WeightParts parts, int64_t layout,
                            std::vector<int64_t> shape) {
  FrozenWeight held{weight, parts, layout, shape};
  if (held.is_packed() && !held.is_nf4()) {
    check_packed(op, &held);
  } else if (held.is_packed() || parts[0].has_value()) {
    check_nf4(op, &held);
  } else {
    STD_TORCH_CHECK(weight.dim() == 2, op, ": weight has ", weight.dim(), " dimensions, wanted 2");
    held.shape.assign(weight.sizes().begin(), weight.sizes().end());
  }
  return held;
}

PackedView view_of(const FrozenWeight& weight) {
  PackedView view{};
  view.part[0] = part_address(weight.weight.const_data_ptr());
  for (int i = 1; i < kWeightParts; ++i)
    view.part[i] = weight.parts[i - 1].has_value() ? part_address(weight.parts[i - 1]->const_data_ptr()) : nullptr;
  view.rows = weight.shape[0];
  view.columns = weight.shape[1];
  view.group = format_group(weight.layout);
  view.option = format_option(weight.layout);
  return view;
}

void check_matrix_weight(const char* op, const FrozenWeight& weight, ScalarType type) {
  STD_TORCH_CHECK(weight.shape.size() == 2, op, ": weight has ", weight.shape.size(), " dimensions, wanted [N, K]");
  STD_TORCH_CHECK(weight.is_packed() || weight.weight.scalar_type() == type, op, ": weight is ",
                  torch::headeronly::toString(weight.weight.scalar_type()), ", wanted ",
                  torch::headeronly::toString(type));
}

}  // namespace peft_ext
