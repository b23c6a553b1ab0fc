// Functions that the activation operators of the CPU and of CUDA share: a check of the activation, and the view of a
// tensor as rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "common/activation.h"
#include "common/tensor_calls.h"

namespace peft_ext {

inline Activation checked_gate(const char* op, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, op, ": activation is ", activation,
                  ", wanted 0 (gelu), 1 (gelu_tanh), 2 (relu), 3 (silu) or 4 (relu2)");
  return static_cast<Activation>(activation);
}

// A tensor [..., columns] as contiguous rows with a distance of `stride` elements between neighbouring rows. rows_apart
// makes a RowsApart object without a copy from, for example, a half of a wider contiguous tensor. rows_apart copies a
// tensor whose rows are not contiguous, overlap, or do not all have the same distance.
struct RowsApart {
  torch::stable::Tensor held;
  int64_t stride;
};

inline RowsApart rows_apart(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, columns = tensor.size(last);
  // Before the loop visits dimension d, `rows` is the product of the sizes of the dimensions between d and the last,
  // and `stride` is the distance between neighbours of these rows.
  int64_t stride = 0, rows = 1;
  bool regular = columns <= 1 || tensor.stride(last) == 1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (rows == 1)
      stride = tensor.stride(d);
    else
      regular = regular && tensor.stride(d) == stride * rows;
    rows *= tensor.size(d);
  }
  if (regular && (rows == 1 || stride >= columns)) return {tensor, rows == 1 ? columns : stride};
  return {as_contiguous(tensor), columns};
}

// The operands gate and up of a gated activation as rows, and the sizes of the result.
struct Parts {
  RowsApart gate;
  std::optional<RowsApart> up;
  std::vector<int64_t> shape;  // shape of y
  int64_t rows, columns;
};

}  // namespace peft_ext
