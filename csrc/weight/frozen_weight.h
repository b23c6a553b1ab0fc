// A frozen weight as an argument of a CPU operator: dense [N, K], or NF4 in bitsandbytes' layout.
#pragma once

#include "cpu/tensor.h"
#include "weight/nf4_layout.h"

namespace peft_ext {

struct FrozenWeight {
  Tensor weight;                 // dense weight [N, K], or packed NF4 codes: ceil(N K / 2) elements of uint8
  std::optional<Tensor> absmax;  // NF4 scales, float32 or with double quantization uint8; nullopt for a dense weight
  std::optional<Tensor> nested_absmax, nested_code, nested_offset;
  int64_t blocksize = 0;
  std::vector<int64_t> shape;

  bool is_nf4() const { return absmax.has_value(); }
  // out_features() is N and in_features() is K of a weight [N, K]. For a weight that is not a matrix, both functions
  // return 0, and check_matrix_weight refuses the weight.
  int64_t out_features() const { return shape.size() == 2 ? shape[0] : 0; }
  int64_t in_features() const { return shape.size() == 2 ? shape[1] : 0; }
};

// Returns the number of elements of a shape. Fails if a size is negative or if the product overflows 63 bits.
int64_t checked_numel(const std::vector<int64_t>& shape);

// Fails with an error that names op if NF4 has no blocks of `blocksize` elements.
void check_blocksize(const char* op, int64_t blocksize);

// Returns the tensor, made contiguous. Fails with an error that names op and argument if the tensor's dtype is not
// `type` or if the tensor does not have `numel` elements.
Tensor checked_part(const char* op, const char* argument, const Tensor& tensor, ScalarType type, int64_t numel);

// Returns the weight with contiguous NF4 tensors. Fails with an error that names op and argument if a tensor's size or
// dtype does not fit the shape.
FrozenWeight checked_weight(const char* op, Tensor weight, std::optional<Tensor> absmax,
                            std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                            std::optional<Tensor> nested_offset, int64_t blocksize, std::vector<int64_t> shape);

// Fails if the weight is not a matrix, or if a dense weight has another dtype than `type`.
void check_matrix_weight(const char* op, const FrozenWeight& weight, ScalarType type);

}  // namespace peft_ext
