// Computes LoRA over a frozen embedding on the CPU. W [V, N] is dense or packed, A is [R, V], B is [N, R], s is the
// scaling, and each of T tokens has an index i:
//
//   S = A[:, i]ᵀ [T, R]      Y = W[i] + S (sB)ᵀ [T, N]
//   P = dY (sB) [T, R]       dA[:, v] = Σ P[t] over the t with i[t] = v, in order       dB = s dYᵀ S
//
// In dA, tokens whose index is padding_idx are left out. The forward reads, or decodes, only the rows of W whose index
// a token has (for NF4, the whole blocks that contain a part of such a row). For kTogether tokens at a time, the rows
// of W are written to Y and the low-rank term is added, while these rows of Y are in the cache. The passes of
// linear/cpu/kernels/kernels.h compute the products. Sums are float32, and each result is rounded once. A row of dA is
// summed by one thread in the order of the tokens, so that the bits are equal for every number of threads.
#include <algorithm>
#include <tuple>
#include <vector>

#include "common/registration.h"
#include "cpu/operator_call.h"
#include "cpu/threads.h"
#include "linear/cpu/passes.h"
#include "packed/cpu/decode.h"

namespace peft_ext {
namespace {

// Number of tokens whose rows of W are copied to Y before the low-rank term is added to these rows of Y, which then are
// still in L2.
constexpr int64_t kTogether = 2 * kRowsTogether;

struct LowRank {
  const char* op;
  Tensor indices;         // int64, contiguous
  Tensor lora_A, lora_B;  // the caller's tensors, which may have any strides
  int64_t tokens, entries, columns, rank;
  std::vector<float> rho;  // R copies of the scaling s, one for each rank

  const int64_t* index() const { return indices.const_data_ptr<int64_t>(); }
};

LowRank checked(const char* op, const Tensor& indices, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, op, ": indices is ",
                  torch::headeronly::toString(indices.scalar_type()), ", wanted Long");
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_B.dim() == 2 && lora_A.size(0) == lora_B.size(1) && lora_A.size(0) > 0, op,
                  ": lora_A and lora_B are not [R, V] and [N, R], of a rank of 1 or more");
  LowRank of{
      op, as_contiguous(indices), lora_A, lora_B, indices.numel(), lora_A.size(1), lora_B.size(0), lora_A.size(0), {}};
  of.rho.assign(static_cast<size_t>(of.rank), 0.0f);
  std::fill_n(of.rho.begin(), of.rank, static_cast<float>(scaling));
  const int64_t* index = of.index();
  for (int64_t t = 0; t < of.tokens; ++t)
    STD_TORCH_CHECK(index[t] >= 0 && index[t] < of.entries, op, ": indices has ", index[t], ", wanted 0 to ",
                    of.entries - 1);
  return of;
}

// Computes S for the tokens [begin, end): the row of S of a token is the column of lora_A at the token's index.
void gather_shrunk(const LowRank& of, int64_t begin, int64_t end, float* s) {
  const int64_t* index = of.index();
  const int64_t by_rank = of.lora_A.stride(0), by_entry = of.lora_A.stride(1);
  with_dtype(dtype_of(of.op, "lora_A", of.lora_A), [&](auto zero) {
    using T = decltype(zero);
    const T* a = static_cast<const T*>(of.lora_A.const_data_ptr());
    for (int64_t t = begin; t < end; ++t) {
      float* row = s + t * of.rank;
      const T* column = a + index[t] * by_entry;
      for (int64_t r = 0; r < of.rank; ++r) row[r] = to_float(column[r * by_rank]);
    }
  });
}

// Copies the row of W of each of the tokens [begin, end) to the token's row of y.
void gather_rows(const LowRank& of, const FrozenWeight& weight, int64_t begin, int64_t end, DType dtype, char* y,
                 std::vector<char>* room) {
  const int64_t* index = of.index();
  const int64_t bytes = of.columns * (dtype == DType::kF32 ? 4 : 2);
  for (int64_t t = begin; t < end; ++t) {
    const void* row;
    if (weight.is_packed()) {
      row = decode_rows(weight, index[t], index[t] + 1, dtype, room->data());
    } else {
      const int64_t stride = weight.weight.stride(0) * (dtype == DType::kF32 ? 4 : 2);
      row = static_cast<const char*>(weight.weight.const_data_ptr()) + index[t] * stride;
    }
    std::copy_n(static_cast<const char*>(row), bytes, y + t * bytes);
  }
}

Tensor lora_embedding_cpu(Tensor indices, Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2,
                          std::optional<Tensor> part3, std::optional<Tensor> part4, int64_t layout,
                          std::vector<int64_t> shape, Tensor lora_A, Tensor lora_B, double scaling,
                          int64_t /* padding_idx */, ScalarType type) {
  constexpr const char* kOp = "lora_embedding";
  FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  check_matrix_weight(kOp, held, type);
  const LowRank of = checked(kOp, indices, lora_A, lora_B, scaling);
  STD_TORCH_CHECK(held.shape[0] == of.entries && held.shape[1] == of.columns, kOp, ": weight is [", held.shape[0], ", ",
                  held.shape[1], "], wanted [", of.entries, ", ", of.columns, "]");
  if (!held.is_packed()) held.weight = with_whole_rows(held.weight);

  std::vector<int64_t> out_shape(indices.sizes().begin(), indices.sizes().end());
  out_shape.push_back(of.columns);
  const Tensor y = empty(out_shape, type);
  if (y.numel() == 0) return y;
  const Tensor s = empty({of.tokens, of.rank}, ScalarType::Float);
  Expand work;
  work.y = y.mutable_data_ptr();
  work.dtype = dtype_of(kOp, "weight", type);
  work.columns = of.columns;
  work.rank = of.rank;
  work.stride = round_up(of.columns, kColumnStep);
  const Tensor right = packed(kOp, "lora_B", lora_B, nullptr, of.rho.data(), true, of.rank, work.stride);
  work.left = s.const_data_ptr<float>();
  work.right = right.const_data_ptr<float>();
  // The residual is y itself, which holds rows of W: expand reads an element of y before it overwrites the element.
  work.residual = work.y;
  const int64_t of_row = held.is_packed() ? room_of_rows(held, 1) * 4 : 0;
  parallel_for(0, of.tokens, ceil_div(kPackGrain, of.columns), [&](int64_t begin, int64_t end) {
    std::vector<char> room(static_cast<size_t>(of_row));
    for (int64_t t = begin; t < end; t += kTogether) {
      const int64_t last = min_i64(t + kTogether, end);
      gather_rows(of, held, t, last, work.dtype, static_cast<char*>(work.y), &room);
      gather_shrunk(of, t, last, s.mutable_data_ptr<float>());
      pass_kernels().expand(work, t, last, 0, of.columns);
    }
  });
  return y;
}

// Computes dA [R, V] in lora_A's dtype from P [T, R].
Tensor grad_of_entries(const LowRank& of, const float* p, int64_t padding_idx) {
  const Tensor grad = empty({of.rank, of.entries}, of.lora_A.scalar_type());
  const int64_t* index = of.index();
  with_dtype(dtype_of(of.op, "lora_A", of.lora_A), [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(grad.mutable_data_ptr());
    parallel_for(0, of.rank, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(static_cast<size_t>(of.entries));
      for (int64_t r = begin; r < end; ++r) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t t = 0; t < of.tokens; ++t)
          if (index[t] != padding_idx) sums[static_cast<size_t>(index[t])] += p[t * of.rank + r];
        for (int64_t v = 0; v < of.entries; ++v) out[r * of.entries + v] = from_float<T>(sums[static_cast<size_t>(v)]);
      }
    });
  });
  return grad;
}

std::tuple<Tensor, Tensor> lora_embedding_backward_cpu(Tensor grad, Tensor indices, Tensor lora_A, Tensor lora_B,
                                                       double scaling, int64_t padding_idx, bool needs_grad_A,
                                                       bool needs_grad_B) {
  constexpr const char* kOp = "lora_embedding_backward";
  const LowRank of = checked(kOp, indices, lora_A, lora_B, scaling);
  STD_TORCH_CHECK(grad.numel() == checked_product(of.tokens, of.columns), kOp, ": grad has ", grad.numel(),
                  " elements, wanted ", of.tokens, " rows of ", of.columns);
  const Tensor held = as_contiguous(grad);
  RowPass pass = make_row_pass(held, dtype_of(kOp, "grad", grad), of.columns, of.rank, Dropout());
  Tensor right, s, p, grad_A = none(lora_A.scalar_type()), grad_B = none(lora_B.scalar_type());
  if (needs_grad_A) {
    right = packed(kOp, "lora_B", lora_B, nullptr, of.rho.data(), true, of.rank, of.columns);
    p = empty({of.tokens, of.rank}, ScalarType::Float);
    pass.right = right.const_data_ptr<float>();
    pass.out = p.mutable_data_ptr<float>();
    if (of.columns == 0) std::fill_n(pass.out, p.numel(), 0.0f);
  }
  if (needs_grad_B) {
    s = empty({of.tokens, of.rank}, ScalarType::Float);
    float* shrunk = s.mutable_data_ptr<float>();
    parallel_for(0, of.tokens, ceil_div(kPackGrain, of.rank),
                 [&](int64_t begin, int64_t end) { gather_shrunk(of, begin, end, shrunk); });
    pass.left = shrunk;
    grad_B = unpacked(kOp, "lora_B", run_outer_pass(pass, of.tokens), 1.0f, nullptr, of.rho.data(), true, lora_B);
  } else if (needs_grad_A) {
    run_row_pass(pass, of.tokens);
  }
  if (needs_grad_A) grad_A = grad_of_entries(of, pass.out, padding_idx);
  return {grad_A, grad_B};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("lora_embedding", PEFT_EXT_CPU_BOX(&peft_ext::lora_embedding_cpu));
  m.impl("lora_embedding_backward", PEFT_EXT_CPU_BOX(&peft_ext::lora_embedding_backward_cpu));
}
