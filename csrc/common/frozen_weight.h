// A frozen [N, K] weight as the operators receive it: dense, or NF4 in bitsandbytes' layout.
#pragma once

#include "common/tensor.h"

namespace peft_ext {

struct FrozenWeight {
  Tensor weight;                 // dense [N, K], or packed uint8 [ceil(N K / 2), 1]
  std::optional<Tensor> absmax;  // none: dense. float32 [blocks], or uint8 [blocks] where nested
  std::optional<Tensor> nested_absmax, nested_code, nested_offset;
  int64_t blocksize = 0;
  std::vector<int64_t> shape;

  bool is_nf4() const { return absmax.has_value(); }
  int64_t out_features() const { return shape[0]; }
  int64_t in_features() const { return shape[1]; }
};

// Contiguous, of the sizes and dtypes that its shape asks for; an error that names op and argument otherwise.
FrozenWeight checked_weight(const char* op, Tensor weight, std::optional<Tensor> absmax,
                            std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                            std::optional<Tensor> nested_offset, int64_t blocksize, std::vector<int64_t> shape);

// That the weight is a matrix, and a dense one of the type that it is read in; an error otherwise.
void check_matrix_weight(const char* op, const FrozenWeight& weight, ScalarType type);

// Whether skinny_product takes this many tokens of x's type against this weight on the CPU path in use.
bool skinny_takes(const FrozenWeight& weight, ScalarType type, int64_t tokens);

// x [T, K] W^T in float32, [T, N], for few tokens against an NF4 weight, decoded in registers. x is contiguous.
Tensor skinny_product(const char* op, const Tensor& x, const FrozenWeight& weight);

// [N, K] in `type`: the dense weight itself, or the NF4 weight dequantized.
Tensor dense_weight(const char* op, const FrozenWeight& weight, ScalarType type);

// The scales of all blocks of an NF4 weight in float32: its own, or decoded into a scratch of the calling thread.
const float* all_scales(const FrozenWeight& weight);

// Elements [begin, end) of an NF4 weight's flat tensor, decoded by the calling thread into `room`, which holds the
// blocks that they touch; where element `begin` lies in it.
const void* dequantize_range(const FrozenWeight& weight, int64_t begin, int64_t end, DType dtype, void* room);

// Rows [begin, end) of an NF4 weight in `type`, over all threads.
Tensor dequantized_rows(const char* op, const FrozenWeight& weight, int64_t begin, int64_t end, ScalarType type);

}  // namespace peft_ext
