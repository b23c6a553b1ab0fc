// Computes the base products x Wᵀ and dY W by PyTorch's matrix product (x Wᵀ of few tokens and a packed weight by
// skinny_product), and the products with only the elements that dropout drops. If multiplies_in(x's dtype, false) is
// false, kWidePanel rows of W at a time are widened to float32 and multiplied.
#include "linear/cpu/base_product.h"

#include "cpu/isa.h"
#include "cpu/threads.h"

#include "linear/cpu/tiles/products.h"
#include "packed/cpu/decode.h"
#include "packed/cpu/skinny.h"

namespace peft_ext {

namespace {

// Number of rows of W that are widened to float32 at a time.
constexpr int64_t kWidePanel = 1024;

// Returns W's rows [begin, end) in float32, [end - begin, K].
Tensor wide_rows(const char* op, const FrozenWeight& weight, int64_t begin, int64_t end, ScalarType type) {
  Tensor dense = weight.weight;
  const Tensor rows = weight.is_packed() ? dequantized_rows(op, weight, begin, end, type)
                                         : torch::stable::narrow(dense, 0, begin, end - begin);
  return as_type(rows, ScalarType::Float);
}

}  // namespace

bool multiplies_in(ScalarType type, bool plain) {
  if (type == ScalarType::Float) return true;
  if (type == ScalarType::BFloat16 && tile_kernels() != nullptr) return true;
  return plain && current_isa() == Isa::kScalar;
}

Tensor product_forward(const char* op, const Tensor& x, const FrozenWeight& weight, ScalarType type) {
  const int64_t tokens = x.size(0), n = weight.out_features();
  if (skinny_accepts(weight, type, tokens)) return skinny_product(op, as_type(x, type), weight);
  if (weight.in_features() == 0) return zeros({tokens, n});
  if (multiplies_in(type, false)) {
    Tensor y = empty({tokens, n}, type);
    mm_out(y, as_type(x, type), transposed(working_weight(op, weight, type)));
    return as_type(y, ScalarType::Float);
  }
  const Tensor wide = as_type(x, ScalarType::Float);
  Tensor y = empty({tokens, n}, ScalarType::Float);
  for (int64_t row = 0; row < n; row += kWidePanel) {
    const int64_t rows = min_i64(kWidePanel, n - row);
    mm_out(torch::stable::narrow(y, 1, row, rows), wide, transposed(wide_rows(op, weight, row, row + rows, type)));
  }
  return y;
}

Tensor product_backward(const char* op, const Tensor& g, const FrozenWeight& weight, ScalarType type) {
  const int64_t tokens = g.size(0), n = weight.out_features(), k = weight.in_features();
  if (n == 0) return zeros({tokens, k});
  if (multiplies_in(type, false)) {
    Tensor y = empty({tokens, k}, type);
    mm_out(y, as_type(g, type), working_weight(op, weight, type));
    return as_type(y, ScalarType::Float);
  }
  Tensor wide = as_type(g, ScalarType::Float);
  Tensor y = zeros({tokens, k});
  for (int64_t row = 0; row < n; row += kWidePanel) {
    const int64_t rows = min_i64(kWidePanel, n - row);
    addmm_(y, as_contiguous(torch::stable::narrow(wide, 1, row, rows)), wide_rows(op, weight, row, row + rows, type),
           1.0);
  }
  return y;
}

bool drops_few(const Dropout& dropout) {
  // As measured, a product with only the dropped elements takes as long as a product with all of W if dropout drops
  // between a quarter and a third of the elements.
  constexpr uint32_t kFewDropped = 65536 / 4;
  return dropout.active && dropout.threshold <= kFewDropped;
}

bool products_apart(const FrozenWeight& weight, ScalarType type, int64_t tokens, const Dropout& dropout) {
  constexpr int64_t kFewest = 128;
  const bool in_float = type == ScalarType::Float || !multiplies_in(type, false);
  return in_float && drops_few(dropout) && tokens >= kFewest && !skinny_accepts(weight, type, tokens);
}

namespace {

constexpr int64_t kDroppedTokens = 128;  // largest number of tokens in one call of a kernel for dropped elements

// Calls run(work, first row) for each group of kDroppedRows rows of W. In each call of `run`, work.turned is the
// transpose of the group's rows of W.
template <typename Run>
void for_turned_rows(const char* op, const FrozenWeight& weight, ScalarType type, const KeepBits& keep,
                     const Run& run) {
  const int64_t n = weight.out_features(), k = weight.in_features();
  if (k == 0) return;
  Dropped work;
  work.columns = k;
  work.keep = keep.data;
  work.keep_words = keep.per_row;
  for (int64_t row = 0; row < n; row += kDroppedRows) {
    work.rows = min_i64(kDroppedRows, n - row);
    work.stride = round_up(work.rows, kDroppedStrip);
    const Tensor rows = wide_rows(op, weight, row, row + work.rows, type);
    const Tensor turned = packed(op, "weight", rows, nullptr, nullptr, true, k, work.stride);
    work.turned = turned.const_data_ptr<float>();
    run(work, row);
  }
}

// Divides `count` rows or columns of W into strips of kDroppedStrip, and the tokens into groups of kDroppedTokens.
// Calls kernel(work, first row or column, first token, end of the tokens) for each strip and each group of tokens.
void over_strips(void (*kernel)(const Dropped&, int64_t, int64_t, int64_t), const Dropped& work, int64_t count,
                 int64_t tokens) {
  const int64_t chunks = ceil_div(tokens, kDroppedTokens);
  parallel_for(0, ceil_div(count, kDroppedStrip) * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i % chunks * kDroppedTokens;
      kernel(work, i / chunks * kDroppedStrip, token, min_i64(token + kDroppedTokens, tokens));
    }
  });
}

}  // namespace

void add_dropped_product(const char* op, const Tensor& x, const KeepBits& keep, const FrozenWeight& weight,
                         const Tensor& out) {
  for_turned_rows(op, weight, x.scalar_type(), keep, [&](Dropped work, int64_t row) {
    work.m = x.const_data_ptr();
    work.dtype = dtype_of(op, "x", x);
    work.m_stride = work.columns;
    work.out = out.mutable_data_ptr<float>() + row;
    work.out_stride = weight.out_features();
    over_strips(pass_kernels().dropped_product, work, work.rows, x.size(0));
  });
}

void put_dropped_dots(const char* op, const Tensor& grad, const KeepBits& keep, const FrozenWeight& weight,
                      const Tensor& out) {
  const int64_t width = grad.scalar_type() == ScalarType::Float ? 4 : 2;
  for_turned_rows(op, weight, grad.scalar_type(), keep, [&](Dropped work, int64_t row) {
    work.m = static_cast<const char*>(grad.const_data_ptr()) + row * width;
    work.dtype = dtype_of(op, "grad", grad);
    work.m_stride = weight.out_features();
    work.out = out.mutable_data_ptr<float>();
    work.out_stride = work.columns;
    work.accumulate = row > 0;
    over_strips(pass_kernels().dropped_dots, work, work.columns, grad.size(0));
  });
}

}  // namespace peft_ext
