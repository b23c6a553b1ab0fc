// Converts the small matrices of an adapter to the kernels' layouts. See packing.h.
#include "cpu/threads.h"
#include "linear/cpu/packing.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {

Tensor zeros(const std::vector<int64_t>& shape) {
  Tensor tensor = empty(shape, ScalarType::Float);
  std::fill_n(tensor.mutable_data_ptr<float>(), tensor.numel(), 0.0f);
  return tensor;
}

namespace {

// Writes the transposed columns [begin, end) of in [rows, columns] to out [columns, stride].
template <typename T>
void transpose_columns(const T* in, int64_t rows, int64_t columns, int64_t begin, int64_t end, float* out,
                       int64_t stride) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < rows; ++j) out[i * stride + j] = to_float(in[j * columns + i]);
}

#if defined(__SSE2__)
void transpose_columns(const float* in, int64_t rows, int64_t columns, int64_t begin, int64_t end, float* out,
                       int64_t stride) {
  const int64_t whole_rows = rows / 4 * 4, whole_end = begin + (end - begin) / 4 * 4;
  for (int64_t i = begin; i < whole_end; i += 4)
    for (int64_t j = 0; j < whole_rows; j += 4) {
      const float* from = in + j * columns + i;
      __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + columns);
      __m128 c = _mm_loadu_ps(from + 2 * columns), d = _mm_loadu_ps(from + 3 * columns);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      float* to = out + i * stride + j;
      _mm_storeu_ps(to, a);
      _mm_storeu_ps(to + stride, b);
      _mm_storeu_ps(to + 2 * stride, c);
      _mm_storeu_ps(to + 3 * stride, d);
    }
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = i < whole_end ? whole_rows : 0; j < rows; ++j) out[i * stride + j] = in[j * columns + i];
}
#endif

}  // namespace

Tensor packed(const char* op, const char* argument, const Tensor& matrix, const float* by_row, const float* by_column,
              bool transpose, int64_t frame_rows, int64_t frame_columns) {
  const Tensor source = as_contiguous(matrix);
  const int64_t rows = source.size(0), columns = source.size(1);
  const int64_t filled_rows = transpose ? columns : rows, filled_columns = transpose ? rows : columns;
  STD_TORCH_CHECK(filled_rows <= frame_rows && filled_columns <= frame_columns, op, ": ", argument, " is [", rows, ", ",
                  columns, "], which is more than the other arguments have");
  const bool fills = filled_rows == frame_rows && filled_columns == frame_columns;
  if (fills && !transpose && by_row == nullptr && by_column == nullptr && source.scalar_type() == ScalarType::Float)
    return source;
  Tensor frame = fills ? empty({frame_rows, frame_columns}, ScalarType::Float) : zeros({frame_rows, frame_columns});
  if (source.numel() == 0) return frame;
  float* out = frame.mutable_data_ptr<float>();
  const float* down = transpose ? by_column : by_row;    // factors of the frame's rows
  const float* across = transpose ? by_row : by_column;  // factors of the frame's columns
  with_dtype(dtype_of(op, argument, source), [&](auto zero) {
    const auto* in = static_cast<const decltype(zero)*>(source.const_data_ptr());
    parallel_for(0, filled_rows, ceil_div(kPackGrain, filled_columns), [&](int64_t begin, int64_t end) {
      if (transpose) transpose_columns(in, rows, columns, begin, end, out, frame_columns);
      for (int64_t i = begin; i < end; ++i) {
        float* row = out + i * frame_columns;
        if (!transpose)
          for (int64_t j = 0; j < columns; ++j) row[j] = to_float(in[i * columns + j]);
        if (down == nullptr && across == nullptr) continue;
        const float by = down == nullptr ? 1.0f : down[i];
        if (across == nullptr)
          for (int64_t j = 0; j < filled_columns; ++j) row[j] *= by;
        else
          for (int64_t j = 0; j < filled_columns; ++j) row[j] *= by * across[j];
      }
    });
  });
  return frame;
}

Tensor unpacked(const char* op, const char* argument, const Tensor& sums, float by, const float* by_column,
                const float* by_rank, bool transpose, const Tensor& like) {
  const int64_t ranks = sums.size(0), columns = sums.size(1);
  Tensor out = empty({like.size(0), like.size(1)}, like.scalar_type());
  const float* in = sums.const_data_ptr<float>();
  with_dtype(dtype_of(op, argument, like), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    // The cache lines of the result in one block stay in L1 for all ranks.
    constexpr int64_t kColumns = 64;
    const int64_t grain = ceil_div(kPackGrain, kColumns * (ranks + 1));
    parallel_for(0, ceil_div(columns, kColumns), grain, [&](int64_t begin, int64_t end) {
      float row[kColumns];
      for (int64_t first = begin * kColumns; first < min_i64(end * kColumns, columns); first += kColumns) {
        const int64_t width = min_i64(kColumns, columns - first);
        for (int64_t rank = 0; rank < ranks; ++rank) {
          const float* from = in + rank * columns + first;
          const float factor = by_rank != nullptr ? by * by_rank[rank] : by;
          if (by_column != nullptr)
            for (int64_t j = 0; j < width; ++j) row[j] = from[j] * by_column[first + j] * factor;
          else
            for (int64_t j = 0; j < width; ++j) row[j] = from[j] * factor;
          if (transpose)
            for (int64_t j = 0; j < width; ++j) to[(first + j) * ranks + rank] = from_float<T>(row[j]);
          else
            for (int64_t j = 0; j < width; ++j) to[rank * columns + first + j] = from_float<T>(row[j]);
        }
      }
    });
  });
  return out;
}

Tensor padded_vector(const char* op, const char* argument, const Tensor& values, int64_t length) {
  if (values.scalar_type() == ScalarType::Float && values.numel() == length && values.is_contiguous()) return values;
  const Tensor row = as_shape(as_contiguous(values), {1, values.numel()});
  return packed(op, argument, row, nullptr, nullptr, false, 1, length);
}

Tensor lane_strips(const float* rows, int64_t rank, int64_t stride, int64_t columns) {
  const int64_t strips = ceil_div(columns, kStrip);
  Tensor out = empty({strips, rank, kStrip}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  parallel_for(0, strips, ceil_div(kPackGrain, rank * kStrip), [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t j = 0; j < kStrip; ++j) {
          const int64_t column = strip * kStrip + j;
          to[(strip * rank + r) * kStrip + j] = column < columns ? rows[r * stride + column] : 0.0f;
        }
  });
  return out;
}

Tensor lane_strips_of_rows(const float* m, int64_t rank, int64_t stride, int64_t columns) {
  const int64_t strips = ceil_div(columns, kStrip);
  Tensor out = empty({strips, rank, kStrip}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  parallel_for(0, strips, ceil_div(kPackGrain, rank * kStrip), [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t j = 0; j < kStrip; ++j) {
          const int64_t column = strip * kStrip + j;
          to[(strip * rank + r) * kStrip + j] = column < columns ? m[column * stride + r] : 0.0f;
        }
  });
  return out;
}

Tensor float_vector(const char* op, const char* argument, const Tensor& values, int64_t numel) {
  STD_TORCH_CHECK(values.numel() == numel, op, ": ", argument, " has ", values.numel(), " elements, wanted ", numel);
  return padded_vector(op, argument, values, numel);
}

}  // namespace peft_ext
