// A frozen weight as an argument of a CPU operator: dense [N, K], or packed. The formats of packed weights are NF4, in
// bitsandbytes' layout, and those of weight/formats/list.h.
#pragma once

#include "cpu/tensor.h"
#include "weight/nf4_layout.h"
#include "weight/packed_view.h"

namespace peft_ext {

using WeightParts = std::vector<std::optional<Tensor>>;  // the parts of a packed weight after the first

struct FrozenWeight {
  Tensor weight;      // dense weight [N, K], or the first part of a packed weight
  WeightParts parts;  // the other parts of a packed weight; of NF4: absmax, nested_absmax, nested_code, nested_offset
  int64_t layout = 0;
  std::vector<int64_t> shape;

  bool is_packed() const { return layout != 0; }
  bool is_nf4() const { return is_packed() && format_number(layout) == 0; }
  int64_t blocksize() const { return format_group(layout); }  // number of elements per block of an NF4 weight
  const Tensor& absmax() const { return *parts[0]; }
  bool is_nested() const { return is_nf4() && parts[1].has_value(); }
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

// Returns the weight with contiguous parts. Fails with an error that names op and the part if a part's size, or for NF4
// a part's dtype, does not fit the shape. `layout` is 0 for a dense weight; for a packed weight see packed_view.h.
FrozenWeight checked_weight(const char* op, Tensor weight, WeightParts parts, int64_t layout,
                            std::vector<int64_t> shape);

// Fails if the weight is not a matrix, or if a dense weight has another dtype than `type`.
void check_matrix_weight(const char* op, const FrozenWeight& weight, ScalarType type);

// Returns the PackedView of the weight, which kernels read. The weight must be a packed matrix in a format other than
// NF4.
PackedView view_of(const FrozenWeight& weight);

}  // namespace peft_ext
