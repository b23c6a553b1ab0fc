// Computes the gradient of the output scale g, dg = sum_t dY ∘ (Z + b₀). See adapted_linear.h.
#include <math.h>

#include <vector>

#include "cpu/threads.h"
#include "linear/cpu/adapted_linear.h"
#include "linear/cpu/base_product.h"
#include "packed/cpu/decode.h"

namespace peft_ext {

namespace {

// Returns the smallest |g| for which dg is computed from Y as (sum_t dY ∘ Y) / g. With a smaller |g|, Y may be
// subnormal in float16, and zero or close to zero in dtypes with float32's exponent range.
float smallest_scale(ScalarType type) { return type == ScalarType::Half ? 0x1p-6f : 0x1p-60f; }

// Returns the given rows of a matrix of any dtype, contiguous.
Tensor gathered_rows(const Tensor& matrix, const std::vector<int64_t>& rows) {
  const int64_t k = matrix.size(1), width = static_cast<int64_t>(matrix.element_size());
  const Tensor held = as_contiguous(matrix);
  const Tensor out = empty({static_cast<int64_t>(rows.size()), k}, matrix.scalar_type());
  const auto* from = static_cast<const char*>(held.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  parallel_for(0, static_cast<int64_t>(rows.size()), ceil_div(kPackGrain, k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      memcpy(to + i * k * width, from + rows[static_cast<size_t>(i)] * k * width, static_cast<size_t>(k * width));
  });
  return out;
}

// Returns the given rows of a packed weight, decoded.
Tensor rows_of_packed(const char* op, const FrozenWeight& weight, const std::vector<int64_t>& rows, ScalarType type) {
  const int64_t k = weight.in_features(), width = type == ScalarType::Float ? 4 : 2;
  const DType dtype = dtype_of(op, "dtype", type);
  const Tensor out = empty({static_cast<int64_t>(rows.size()), k}, type);
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  parallel_for(0, static_cast<int64_t>(rows.size()), ceil_div(kPackGrain, k + 1), [&](int64_t begin, int64_t end) {
    std::vector<char> room(static_cast<size_t>(room_of_rows(weight, 1) * width));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = rows[static_cast<size_t>(i)];
      memcpy(to + i * k * width, decode_rows(weight, row, row + 1, dtype, room.data()), static_cast<size_t>(k * width));
    }
  });
  return out;
}

// Computes Z + b₀ again, only for the outputs in `outputs`, as [T, number of outputs] float32.
Tensor z_again(const char* op, const Tensor& x, const FrozenWeight& weight, const Adapter& adapter,
               const std::optional<Tensor>& s, const std::optional<Tensor>& bias, const std::vector<int64_t>& outputs) {
  const ScalarType type = x.scalar_type();
  const auto count = static_cast<int64_t>(outputs.size());
  const int64_t tokens = x.size(0);
  FrozenWeight some;
  some.weight = weight.is_packed() ? rows_of_packed(op, weight, outputs, type) : gathered_rows(weight.weight, outputs);
  some.shape = {count, weight.in_features()};
  const Tensor z = product_forward(op, x, some, type);
  if (adapter.low_rank()) {
    const std::vector<float> rho(static_cast<size_t>(adapter.rank()), static_cast<float>(adapter.scaling));
    const Tensor b = packed(op, "lora_B", gathered_rows(*adapter.lora_B, outputs), nullptr, rho.data(), false, count,
                            adapter.rank());
    addmm_(z, as_shape(as_contiguous(*s), {tokens, adapter.rank()}), transposed(b), 1.0);
  }
  if (!bias.has_value()) return z;
  const Tensor wide_bias = float_vector(op, "bias", *bias, weight.out_features());
  float* data = z.mutable_data_ptr<float>();
  parallel_for(0, tokens, ceil_div(kPackGrain, count), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < count; ++i)
        data[t * count + i] += wide_bias.const_data_ptr<float>()[outputs[static_cast<size_t>(i)]];
  });
  return z;
}

// Returns the given columns of dY [T, N], in dY's dtype.
Tensor gathered_columns(const char* op, const Tensor& grad, const std::vector<int64_t>& columns) {
  const int64_t tokens = grad.size(0), n = grad.size(1);
  const auto count = static_cast<int64_t>(columns.size());
  const Tensor out = empty({tokens, count}, grad.scalar_type());
  with_dtype(dtype_of(op, "grad", grad), [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(grad.const_data_ptr());
    auto* to = static_cast<decltype(zero)*>(out.mutable_data_ptr());
    parallel_for(0, tokens, ceil_div(kPackGrain, count), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < count; ++i) to[t * count + i] = from[t * n + columns[static_cast<size_t>(i)]];
    });
  });
  return out;
}

}  // namespace

Tensor scale_gradient(const char* op, const Tensor& grad, const Tensor& x, const FrozenWeight& weight,
                      const Adapter& adapter, const std::optional<Tensor>& s, const Tensor& z, bool z_is_scaled,
                      const std::optional<Tensor>& bias_before) {
  const int64_t n = weight.out_features(), tokens = rows_of(x);
  const Tensor flat_grad = as_shape(as_contiguous(grad), {tokens, n});
  const Tensor sums = column_pass(op, flat_grad, nullptr, 0.0f, &z).sums;
  if (!z_is_scaled) return sums;
  const float* g = adapter.out_scale->const_data_ptr<float>();
  const float smallest = smallest_scale(x.scalar_type());
  float* to = sums.mutable_data_ptr<float>();
  std::vector<int64_t> small;
  for (int64_t i = 0; i < n; ++i) {
    if (!(fabsf(g[i]) >= smallest)) small.push_back(i);
    to[i] /= g[i];
  }
  if (small.empty()) return sums;
  const Tensor flat_x = as_shape(as_contiguous(x), {tokens, weight.in_features()});
  const Tensor again = z_again(op, flat_x, weight, adapter, s, bias_before, small);
  const Tensor found = column_pass(op, gathered_columns(op, flat_grad, small), nullptr, 0.0f, &again).sums;
  for (size_t i = 0; i < small.size(); ++i) to[small[i]] = found.const_data_ptr<float>()[i];
  return sums;
}

}  // namespace peft_ext
