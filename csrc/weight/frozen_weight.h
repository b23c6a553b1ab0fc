// A frozen weight as the CPU's operators receive it: dense [N, K], or NF4 in bitsandbytes' layout.
#pragma once

#include "cpu/tensor.h"
#include "weight/nf4_layout.h"

namespace peft_ext {

struct FrozenWeight {
  Tensor weight;                 // dense [N, K], or packed uint8 [ceil(N K / 2), 1]
  std::optional<Tensor> absmax;  // none: dense. float32 [blocks], or uint8 [blocks] where nested
  std::optional<Tensor> nested_absmax, nested_code, nested_offset;
  int64_t blocksize = 0;
  std::vector<int64_t> shape;

  bool is_nf4() const { return absmax.has_value(); }
  // Of a matrix: 0 of any other shape, which check_matrix_weight refuses.
  int64_t out_features() const { return shape.size() == 2 ? shape[0] : 0; }
  int64_t in_features() const { return shape.size() == 2 ? shape[1] : 0; }
};

// The elements of a shape; an error where one is negative, or where 63 bits do not hold their product.
int64_t checked_numel(const std::vector<int64_t>& shape);

// An error that names op, unless NF4 has blocks of this size.
void check_blocksize(const char* op, int64_t blocksize);

// The tensor, contiguous; an error that names op and argument unless it has this type and this many elements.
Tensor checked_part(const char* op, const char* argument, const Tensor& tensor, ScalarType type, int64_t numel);

// The weight, contiguous, of the sizes and dtypes that its shape asks for; an error that names op and argument
// otherwise.
FrozenWeight checked_weight(const char* op, Tensor weight, std::optional<Tensor> absmax,
                            std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                            std::optional<Tensor> nested_offset, int64_t blocksize, std::vector<int64_t> shape);

// An error unless the weight is a matrix, and a dense one of the type that it is read in.
void check_matrix_weight(const char* op, const FrozenWeight& weight, ScalarType type);

}  // namespace peft_ext
