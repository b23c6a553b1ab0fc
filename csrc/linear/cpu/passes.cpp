#include "linear/cpu/passes.h"

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "linear/cpu/chunk_sums.h"
#include "nf4/cpu/decode.h"

namespace peft_ext {

using torch::stable::parallel_for;

namespace {

constexpr int64_t kTokenGrain = 16;
// Rows of W decoded together for a pass over W.
constexpr int64_t kRowChunk = 64;

// W's rows [first, last) in `type`, by the calling thread: where they lie, or decoded into its scratch.
const void* weight_rows(const FrozenWeight& weight, const Tensor& dense, ScalarType type, int64_t first, int64_t last) {
  const int64_t k = weight.in_features(), width = type == ScalarType::Float ? 4 : 2;
  if (!weight.is_nf4()) return static_cast<const char*>(dense.const_data_ptr()) + first * k * width;
  const size_t room = static_cast<size_t>(((last - first) * k + 2 * weight.blocksize) * width);
  return dequantize_range(weight, first * k, last * k, dtype_of("nf4_dequantize", "dtype", type),
                          scratch(Scratch::kRows, room));
}

RowPass weight_pass(const char* op, const FrozenWeight& weight, ScalarType type, int64_t padded) {
  RowPass pass;
  pass.dtype = dtype_of(op, "dtype", type);
  pass.columns = weight.in_features();
  pass.rank = padded;
  return pass;
}

}  // namespace

const PassKernels& pass_kernels() {
#if defined(__x86_64__)
  return select_kernels(&kPassKernelsScalar, &kPassKernelsAvx2, &kPassKernelsAvx512);
#elif defined(__aarch64__)
  return select_kernels(&kPassKernelsScalar, &kPassKernelsNeon);
#else
  return kPassKernelsScalar;
#endif
}

RowPass make_row_pass(const Tensor& m, DType dtype, int64_t columns, int64_t rank, const Dropout& dropout) {
  RowPass pass;
  pass.m = m.const_data_ptr();
  pass.dtype = dtype;
  pass.columns = columns;
  pass.rank = rank;
  pass.dropout = dropout;
  return pass;
}

void run_row_pass(const RowPass& pass, int64_t tokens) {
  const PassKernels& isa = pass_kernels();
  parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) { isa.row_pass(pass, begin, end); });
}

Tensor run_outer_pass(const RowPass& pass, int64_t tokens) {
  const PassKernels& isa = pass_kernels();
  const Tensor sums = sum_chunks(tokens, pass.columns * pass.rank, [&](int64_t first, int64_t last, float* out) {
    RowPass part = pass;
    part.acc = out;
    isa.row_pass(part, first, last);
  });
  return as_shape(sums, {pass.columns, pass.rank});
}

void run_expand(const Expand& work, int64_t tokens) {
  const PassKernels& isa = pass_kernels();
  parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) { isa.expand(work, begin, end); });
}

KeepBits keep_bits(int64_t tokens, int64_t columns) {
  KeepBits keep;
  keep.per_row = ceil_div(columns, 32);
  keep.words = empty({tokens, keep.per_row}, ScalarType::Float);
  keep.data = static_cast<uint32_t*>(keep.words.mutable_data_ptr());
  return keep;
}

Tensor dropped_elements(const char* op, const Tensor& x, const Dropout& dropout) {
  Tensor out = empty({x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  const DropElements work{x.const_data_ptr(), dtype_of(op, "x", x), dropout, out.mutable_data_ptr()};
  const int64_t count = x.numel(), groups = ceil_div(count, kDropTogether);
  const PassKernels& isa = pass_kernels();
  parallel_for(0, groups, ceil_div(kPackGrain, kDropTogether), [&](int64_t begin, int64_t end) {
    isa.drop_elements(work, begin * kDropTogether, min_i64(end * kDropTogether, count));
  });
  return out;
}

ColumnSums column_pass(const char* op, const Tensor& m, const Tensor* scale, float shift, const Tensor* other) {
  const int64_t columns = m.size(m.dim() - 1), tokens = rows_of(m);
  const Tensor held = as_contiguous(m);
  Tensor held_other;
  ColumnPass pass;
  pass.m = held.const_data_ptr();
  pass.dtype = dtype_of(op, "x", held);
  pass.columns = columns;
  ColumnSums result{none(m.scalar_type()), none()};
  if (scale != nullptr) {
    result.scaled = empty({m.sizes().begin(), m.sizes().end()}, m.scalar_type());
    pass.out = result.scaled.mutable_data_ptr();
    pass.scale = scale->const_data_ptr<float>();
    pass.shift = shift;
  }
  const PassKernels& isa = pass_kernels();
  if (other == nullptr) {
    parallel_for(0, tokens, ceil_div(kPackGrain, columns + 1),
                 [&](int64_t begin, int64_t end) { isa.column_pass(pass, begin, end); });
    return result;
  }
  STD_TORCH_CHECK(other->numel() == m.numel(), op, ": sizes ", m.numel(), " and ", other->numel(), " differ");
  held_other = as_contiguous(*other);
  pass.other = held_other.const_data_ptr();
  pass.other_dtype = dtype_of(op, "x", held_other);
  result.sums = sum_chunks(tokens, columns, [&](int64_t first, int64_t last, float* sums) {
    ColumnPass part = pass;
    part.sums = sums;
    isa.column_pass(part, first, last);
  });
  return result;
}

void run_few_tokens(const char* op, const Tensor& w, const Tensor& x, const Tensor& y, bool accumulate) {
  FewTokens work;
  work.w = w.const_data_ptr();
  work.dtype = dtype_of(op, "weight", w);
  work.rows = w.size(0);
  work.columns = w.size(1);
  work.tokens = x.size(0);
  work.x = x.const_data_ptr<float>();
  work.y = y.mutable_data_ptr<float>();
  work.accumulate = accumulate;
  const PassKernels& isa = pass_kernels();
  parallel_for(0, work.rows, ceil_div(kPackGrain, work.columns * work.tokens),
               [&](int64_t begin, int64_t end) { isa.few_tokens(work, begin, end); });
}

RowFacts weight_row_facts(const char* op, const FrozenWeight& weight, const Tensor& lora_A, ScalarType type) {
  const ScratchOfCall scratch_of_call;
  check_matrix_weight(op, weight, type);
  const int64_t n = weight.out_features(), k = weight.in_features(), padded = round_up(lora_A.size(0), kRankStep);
  RowFacts facts{zeros({n, padded}), zeros({n})};
  if (n == 0 || k == 0) return facts;
  const Tensor right = packed(op, "lora_A", lora_A, nullptr, nullptr, true, k, padded);
  const Tensor dense = weight.is_nf4() ? Tensor() : as_contiguous(weight.weight);
  const PassKernels& isa = pass_kernels();
  parallel_for(0, ceil_div(n, kRowChunk), 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kRowChunk; first < min_i64(end * kRowChunk, n); first += kRowChunk) {
      const int64_t last = min_i64(first + kRowChunk, n);
      RowPass pass = weight_pass(op, weight, type, padded);
      pass.m = weight_rows(weight, dense, type, first, last);
      pass.right = right.const_data_ptr<float>();
      pass.out = facts.product.mutable_data_ptr<float>() + first * padded;
      pass.squares = facts.squares.mutable_data_ptr<float>() + first;
      isa.row_pass(pass, 0, last - first);
    }
  });
  return facts;
}

Tensor weight_outer(const char* op, const FrozenWeight& weight, const Tensor& left, ScalarType type) {
  check_matrix_weight(op, weight, type);
  const int64_t n = weight.out_features(), k = weight.in_features(), rank = left.size(1);
  const int64_t padded = round_up(rank, kRankStep);
  if (n == 0 || k == 0) return zeros({rank, k});
  const Tensor framed = packed(op, "left", left, nullptr, nullptr, false, n, padded);
  const Tensor dense = weight.is_nf4() ? Tensor() : as_contiguous(weight.weight);
  const PassKernels& isa = pass_kernels();
  const Tensor sums = sum_chunks(n, k * padded, [&](int64_t begin, int64_t end, float* out) {
    for (int64_t first = begin; first < end; first += kRowChunk) {
      const int64_t last = min_i64(first + kRowChunk, end);
      RowPass pass = weight_pass(op, weight, type, padded);
      pass.m = weight_rows(weight, dense, type, first, last);
      pass.left = framed.const_data_ptr<float>() + first * padded;
      pass.acc = out;
      isa.row_pass(pass, 0, last - first);
    }
  });
  const Tensor like = empty({rank, k}, ScalarType::Float);
  return unpacked(op, "left", as_shape(sums, {k, padded}), nullptr, nullptr, true, like);
}

}  // namespace peft_ext
