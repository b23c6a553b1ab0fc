// LoRA operators on the CPU: checks, packing of the small matrices, threads.
//
//   forward:  S = x̃ Aᵀ;  Y = b + s S Bᵀ (write-only);  Y += x Wᵀ in place
//   backward: one pass over dY gives P = s dY B and dB = s dYᵀ S; one over x gives dA = Pᵀ x̃;
//             dX = mask/(1-p) (P A) (write-only);  dX += dY W in place
//
// Few tokens against an NF4 weight are multiplied as it is decoded, in float32, and Y is written once with all terms.
// Else the base product accumulates onto the low-rank term, so that nothing of size T x N is read or written but Y and
// dX. Sums over tokens are made per chunk of tokens, whose number depends on T alone, and then added in order: the same
// bits for any number of threads.
#include <string.h>

#include <tuple>

#include "common/frozen_weight.h"
#include "common/isa.h"
#include "lora/lora_kernels.h"

namespace peft_ext {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kTokenGrain = 16;
constexpr int64_t kPackGrain = 1 << 14;
constexpr int64_t kMinChunkTokens = 128;
constexpr int64_t kMaxChunks = 8;

const LoraKernels& kernels() {
#if defined(__x86_64__)
  return select_kernels(&kLoraKernelsScalar, &kLoraKernelsAvx2, &kLoraKernelsAvx512);
#else
  return kLoraKernelsScalar;
#endif
}

int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

Tensor zeros(const std::vector<int64_t>& shape) {
  Tensor tensor = empty(shape, ScalarType::Float);
  memset(tensor.mutable_data_ptr(), 0, static_cast<size_t>(tensor.numel()) * sizeof(float));
  return tensor;
}

// A matrix [rows, columns] of any dtype as float32, scaled, in a zero-padded frame [frame_rows, frame_columns],
// transposed on the way where asked.
Tensor packed(const char* op, const char* argument, const Tensor& matrix, float scale, bool transpose,
              int64_t frame_rows, int64_t frame_columns) {
  const Tensor source = torch::stable::contiguous(matrix);
  const int64_t rows = source.size(0), columns = source.size(1);
  Tensor frame = zeros({frame_rows, frame_columns});
  if (source.numel() == 0) return frame;
  float* out = frame.mutable_data_ptr<float>();
  with_dtype(dtype_of(op, argument, source), [&](auto zero) {
    const auto* in = static_cast<const decltype(zero)*>(source.const_data_ptr());
    // Rows of the frame, each written in one piece.
    parallel_for(0, transpose ? columns : rows, ceil_div(kPackGrain, transpose ? rows : columns),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     float* row = out + i * frame_columns;
                     if (transpose)
                       for (int64_t j = 0; j < rows; ++j) row[j] = scale * to_float(in[j * columns + i]);
                     else
                       for (int64_t j = 0; j < columns; ++j) row[j] = scale * to_float(in[i * columns + j]);
                   }
                 });
  });
  return frame;
}

// [T, rank] as [T, padded rank]; the tensor itself where nothing is to be padded.
Tensor padded_rank(const Tensor& s, int64_t padded) {
  return s.size(1) == padded ? s : packed("lora_linear", "s", s, 1.0f, false, s.size(0), padded);
}

Dropout make_dropout(const char* op, double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (!seed.has_value()) return dropout;
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 2, op, ": seed is ",
                  torch::headeronly::toString(seed->scalar_type()), " with ", seed->numel(),
                  " elements, wanted Long with 2");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": dropout_p is ", p, ", wanted 0 <= p < 1");
  const Tensor held = torch::stable::contiguous(*seed);
  const int64_t* words = held.const_data_ptr<int64_t>();
  dropout.active = true;
  dropout.seed = static_cast<uint64_t>(words[0]);
  dropout.offset = static_cast<uint64_t>(words[1]);
  dropout.threshold = static_cast<uint32_t>(__builtin_nearbyint(p * 65536.0));
  dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  return dropout;
}

struct Sizes {
  int64_t tokens, in, out, rank, padded;
};

Sizes checked_sizes(const char* op, const Tensor& x, const FrozenWeight& weight, const Tensor& lora_A,
                    const Tensor& lora_B) {
  const int64_t k = weight.in_features(), n = weight.out_features();
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, op, ": x has ", x.dim() >= 1 ? x.size(x.dim() - 1) : 0,
                  " columns, wanted ", k);
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(1) == k, op, ": lora_A has ", lora_A.numel(),
                  " elements, wanted [R, ", k, "]");
  const int64_t rank = lora_A.size(0);
  STD_TORCH_CHECK(lora_B.dim() == 2 && lora_B.size(0) == n && lora_B.size(1) == rank, op, ": lora_B has ",
                  lora_B.numel(), " elements, wanted [", n, ", ", rank, "]");
  return {rows_of(x), k, n, rank, round_up(rank, kRankStep)};
}

void run_expand(const Tensor& left, const Tensor& right, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& base, const Dropout& dropout, DType dtype, int64_t columns, int64_t tokens,
                const Tensor& y) {
  Expand work;
  work.y = y.mutable_data_ptr();
  work.dtype = dtype;
  work.columns = columns;
  work.rank = left.size(1);
  work.stride = right.size(1);
  work.dropout = dropout;
  work.left = left.const_data_ptr<float>();
  work.right = right.const_data_ptr<float>();
  work.bias = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  work.base = base.has_value() ? base->const_data_ptr<float>() : nullptr;
  const LoraKernels& isa = kernels();
  parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) { isa.expand(work, begin, end); });
}

// Runs the pass over all tokens. With `left`, each chunk of tokens sums into its own [columns, rank], and the chunks
// are added in order: returns that sum [columns, rank].
Tensor run_row_pass(RowPass pass, int64_t tokens) {
  const LoraKernels& isa = kernels();
  if (pass.left == nullptr) {
    parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) { isa.row_pass(pass, begin, end); });
    return Tensor();
  }
  const int64_t wanted = ceil_div(tokens, kMaxChunks);
  const int64_t chunk = round_up(wanted < kMinChunkTokens ? kMinChunkTokens : wanted, 8);
  const int64_t chunks = ceil_div(tokens, chunk);
  const int64_t size = pass.columns * pass.rank;
  Tensor sums = empty({chunks, pass.columns, pass.rank}, ScalarType::Float);
  float* data = sums.mutable_data_ptr<float>();
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      RowPass part = pass;
      part.acc = data + c * size;
      memset(part.acc, 0, static_cast<size_t>(size) * sizeof(float));
      isa.row_pass(part, c * chunk, min_i64((c + 1) * chunk, tokens));
    }
  });
  parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t c = 1; c < chunks; ++c) {
      const float* part = data + c * size;
      for (int64_t i = begin; i < end; ++i) data[i] += part[i];
    }
  });
  return torch::stable::select(sums, 0, 0);
}

RowPass make_row_pass(const Tensor& m, DType dtype, int64_t columns, int64_t rank, const Dropout& dropout) {
  RowPass pass;
  pass.m = m.const_data_ptr();
  pass.dtype = dtype;
  pass.columns = columns;
  pass.rank = rank;
  pass.dropout = dropout;
  pass.right = nullptr;
  pass.out = nullptr;
  pass.left = nullptr;
  pass.acc = nullptr;
  return pass;
}

// sums [columns, padded rank] float32 -> like [R, columns] (transposed) or [columns, R], scaled, in like's dtype.
Tensor unpacked(const char* op, const char* argument, const Tensor& sums, float scale, bool transpose,
                const Tensor& like) {
  const int64_t rows = like.size(0), columns = like.size(1), padded = sums.size(1);
  Tensor out = empty({rows, columns}, like.scalar_type());
  const float* in = sums.const_data_ptr<float>();
  with_dtype(dtype_of(op, argument, like), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        to[i * columns + j] = from_float<T>(scale * (transpose ? in[j * padded + i] : in[i * padded + j]));
  });
  return out;
}

std::tuple<Tensor, Tensor> lora_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> absmax,
                                           std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                                           std::optional<Tensor> nested_offset, int64_t blocksize,
                                           std::vector<int64_t> shape, std::optional<Tensor> bias, Tensor lora_A,
                                           Tensor lora_B, double scaling, double dropout_p,
                                           std::optional<Tensor> seed) {
  constexpr const char* kOp = "lora_linear";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  const Sizes z = checked_sizes(kOp, x, held, lora_A, lora_B);
  const DType dtype = dtype_of(kOp, "x", x);
  const Dropout dropout = make_dropout(kOp, dropout_p, seed);
  x = torch::stable::contiguous(x);
  Tensor y = empty(with_last(x, z.out), x.scalar_type());
  Tensor s = empty({z.tokens, z.rank}, ScalarType::Float);
  if (z.tokens == 0) return {y, s};

  const Tensor right_a = packed(kOp, "lora_A", lora_A, 1.0f, true, z.in, z.padded);
  Tensor s_padded = z.padded == z.rank ? s : empty({z.tokens, z.padded}, ScalarType::Float);
  RowPass pass = make_row_pass(x, dtype, z.in, z.padded, dropout);
  pass.right = right_a.const_data_ptr<float>();
  pass.out = s_padded.mutable_data_ptr<float>();
  if (z.in == 0) memset(pass.out, 0, static_cast<size_t>(s_padded.numel()) * sizeof(float));
  run_row_pass(pass, z.tokens);
  if (z.padded != z.rank) torch::stable::copy_(s, torch::stable::narrow(s_padded, 1, 0, z.rank));
  if (z.out == 0) return {y, s};

  const int64_t stride = round_up(z.out, kColumnStep);
  const Tensor right_b = packed(kOp, "lora_B", lora_B, static_cast<float>(scaling), true, z.padded, stride);
  std::optional<Tensor> wide_bias;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->numel() == z.out, kOp, ": bias has ", bias->numel(), " elements, wanted ", z.out);
    wide_bias =
        packed(kOp, "bias", torch::stable::view(torch::stable::contiguous(*bias), {1, z.out}), 1.0f, false, 1, stride);
  }
  const Tensor flat_x = torch::stable::view(x, {z.tokens, z.in});
  if (skinny_takes(held, x.scalar_type(), z.tokens)) {
    run_expand(s_padded, right_b, wide_bias, skinny_product(kOp, flat_x, held), Dropout(), dtype, z.out, z.tokens, y);
    return {y, s};
  }
  run_expand(s_padded, right_b, wide_bias, std::nullopt, Dropout(), dtype, z.out, z.tokens, y);
  if (z.in > 0)
    addmm_(torch::stable::view(y, {z.tokens, z.out}), flat_x, transposed(dense_weight(kOp, held, x.scalar_type())),
           1.0);
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_cpu(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
    std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
    std::vector<int64_t> shape, Tensor lora_A, Tensor lora_B, Tensor s, double scaling, double dropout_p,
    std::optional<Tensor> seed, bool needs_grad_x) {
  constexpr const char* kOp = "lora_linear_backward";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  const Sizes z = checked_sizes(kOp, x, held, lora_A, lora_B);
  STD_TORCH_CHECK(grad.numel() == z.tokens * z.out && grad.scalar_type() == x.scalar_type(), kOp, ": grad has ",
                  grad.numel(), " elements of ", torch::headeronly::toString(grad.scalar_type()), ", wanted ",
                  z.tokens * z.out, " of ", torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(s.scalar_type() == ScalarType::Float && s.numel() == z.tokens * z.rank, kOp, ": s has ", s.numel(),
                  " elements, wanted ", z.tokens * z.rank);
  const DType dtype = dtype_of(kOp, "x", x);
  const Dropout dropout = make_dropout(kOp, dropout_p, seed);
  const float scale = static_cast<float>(scaling);
  grad = torch::stable::contiguous(grad);
  x = torch::stable::contiguous(x);

  const Tensor left_s = padded_rank(torch::stable::contiguous(s), z.padded);
  const Tensor right_b = packed(kOp, "lora_B", lora_B, scale, false, z.out, z.padded);
  const Tensor p = z.out > 0 ? empty({z.tokens, z.padded}, ScalarType::Float) : zeros({z.tokens, z.padded});
  RowPass over_grad = make_row_pass(grad, dtype, z.out, z.padded, Dropout());
  over_grad.right = right_b.const_data_ptr<float>();
  over_grad.out = p.mutable_data_ptr<float>();
  over_grad.left = left_s.const_data_ptr<float>();
  RowPass over_x = make_row_pass(x, dtype, z.in, z.padded, dropout);
  over_x.left = p.const_data_ptr<float>();
  // Without tokens there is no chunk to sum: the gradients are zero.
  const Tensor sums_b = z.tokens > 0 ? run_row_pass(over_grad, z.tokens) : zeros({z.out, z.padded});
  const Tensor sums_a = z.tokens > 0 ? run_row_pass(over_x, z.tokens) : zeros({z.in, z.padded});
  const Tensor grad_b = unpacked(kOp, "lora_B", sums_b, scale, false, lora_B);
  const Tensor grad_a = unpacked(kOp, "lora_A", sums_a, 1.0f, true, lora_A);
  if (!needs_grad_x) return {empty({0}, x.scalar_type()), grad_a, grad_b};

  Tensor grad_x = empty({x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  if (grad_x.numel() == 0) return {grad_x, grad_a, grad_b};
  const Tensor right_a = packed(kOp, "lora_A", lora_A, 1.0f, false, z.padded, round_up(z.in, kColumnStep));
  run_expand(p, right_a, std::nullopt, std::nullopt, dropout, dtype, z.in, z.tokens, grad_x);
  if (z.out > 0)
    addmm_(torch::stable::view(grad_x, {z.tokens, z.in}), torch::stable::view(grad, {z.tokens, z.out}),
           dense_weight(kOp, held, x.scalar_type()), 1.0);
  return {grad_x, grad_a, grad_b};
}

}  // namespace
}  // namespace peft_ext

STABLE_TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&peft_ext::lora_linear_cpu));
  m.impl("lora_linear_backward", TORCH_BOX(&peft_ext::lora_linear_backward_cpu));
}
