// Converts the small matrices of an adapter to the kernels' layouts. See packing.h.
#include "linear/cpu/packing.h"

#include <algorithm>

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

constexpr int64_t kSide = 64;  // number of rows and columns of a block that is transposed at a time

// Writes the transpose of the first `columns` columns of block [rows, kSide] to `out`, whose rows are `stride` floats
// apart.
void transpose_block(const float* block, int64_t rows, int64_t columns, float* out, int64_t stride) {
  int64_t i = 0;
#if defined(__SSE2__)
  for (; i + 4 <= rows; i += 4)
    for (int64_t j = 0; j < columns; j += 4) {  // the block has room for whole groups of four columns
      const float* from = block + i * kSide + j;
      __m128 r[4] = {_mm_load_ps(from), _mm_load_ps(from + kSide), _mm_load_ps(from + 2 * kSide),
                     _mm_load_ps(from + 3 * kSide)};
      _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
      for (int64_t q = 0; q < min_i64(4, columns - j); ++q) _mm_storeu_ps(out + (j + q) * stride + i, r[q]);
    }
#endif
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t q = i; q < rows; ++q) out[j * stride + q] = block[q * kSide + j];
}

// The arguments of packed(), which converts a matrix [rows, columns] to a zero-padded float32 matrix (the frame).
struct Conversion {
  DType dtype;
  const void* matrix;
  int64_t rows, columns;
  const float *by_row, *by_column;
  bool transpose;
  float* out;
  int64_t stride;  // number of columns of `out`, the zero-padded matrix

  // Converts the columns [first, last) of row i of the matrix to float32, and writes them to `to`.
  template <typename T>
  void convert_row(int64_t i, int64_t first, int64_t last, float* to) const {
    const T* from = static_cast<const T*>(matrix) + i * columns;
    for (int64_t j = first; j < last; ++j) to[j - first] = to_float(from[j]);
    if (by_row == nullptr && by_column == nullptr) return;
    const float by = by_row == nullptr ? 1.0f : by_row[i];
    if (by_column == nullptr)
      for (int64_t j = first; j < last; ++j) to[j - first] *= by;
    else
      for (int64_t j = first; j < last; ++j) to[j - first] *= by * by_column[j];
  }
  // Writes the rows [begin, end) of the zero-padded result, without transposing.
  template <typename T>
  void copy_rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      float* to = out + i * stride;
      const int64_t filled = i < rows ? columns : 0;
      if (filled > 0) convert_row<T>(i, 0, columns, to);
      std::fill(to + filled, to + stride, 0.0f);
    }
  }
  // Writes the rows [first, first + width) of the matrix, or zeros beyond the matrix, to the columns with the same
  // numbers of the transposed result.
  template <typename T>
  void transpose_rows(int64_t first, int64_t width, int64_t frame_rows) const {
    alignas(64) float block[kSide * kSide];
    const int64_t filled = std::max<int64_t>(0, min_i64(width, rows - first));
    for (int64_t column = 0; column < columns; column += kSide) {
      const int64_t count = min_i64(kSide, columns - column);
      for (int64_t i = 0; i < filled; ++i) convert_row<T>(first + i, column, column + count, block + i * kSide);
      transpose_block(block, filled, count, out + column * stride + first, stride);
    }
    for (int64_t i = 0; i < frame_rows; ++i) {
      float* to = out + i * stride + first;
      std::fill(to + (i < columns ? filled : 0), to + width, 0.0f);
    }
  }
  // Writes the columns [first, first + width) of the matrix, or zeros beyond the matrix, to the rows with the same
  // numbers of the transposed result.
  template <typename T>
  void transpose_columns(int64_t first, int64_t width) const {
    alignas(64) float block[kSide * kSide];
    const int64_t filled = std::max<int64_t>(0, min_i64(width, columns - first));
    for (int64_t row = 0; row < rows; row += kSide) {
      const int64_t count = min_i64(kSide, rows - row);
      for (int64_t i = 0; i < count; ++i) convert_row<T>(row + i, first, first + filled, block + i * kSide);
      transpose_block(block, count, filled, out + first * stride + row, stride);
    }
    for (int64_t i = 0; i < width; ++i) {
      float* to = out + (first + i) * stride;
      std::fill(to + (i < filled ? rows : 0), to + stride, 0.0f);
    }
  }
};

}  // namespace

Tensor packed(Loops* loops, const char* op, const char* argument, const Tensor& matrix, const float* by_row,
              const float* by_column, bool transpose, int64_t frame_rows, int64_t frame_columns) {
  const Tensor source = as_contiguous(matrix);
  const int64_t rows = source.size(0), columns = source.size(1);
  const int64_t filled_rows = transpose ? columns : rows, filled_columns = transpose ? rows : columns;
  STD_TORCH_CHECK(filled_rows <= frame_rows && filled_columns <= frame_columns, op, ": ", argument, " is [", rows, ", ",
                  columns, "], which is more than the other arguments have");
  const bool fills = filled_rows == frame_rows && filled_columns == frame_columns;
  if (fills && !transpose && by_row == nullptr && by_column == nullptr && source.scalar_type() == ScalarType::Float)
    return source;
  const Tensor frame = empty({frame_rows, frame_columns}, ScalarType::Float);
  if (frame.numel() == 0) return frame;
  const Conversion work{dtype_of(op, argument, source),
                        source.const_data_ptr(),
                        rows,
                        columns,
                        by_row,
                        by_column,
                        transpose,
                        static_cast<float*>(frame.mutable_data_ptr()),
                        frame_columns};
  if (!transpose) {
    loops->add(frame_rows, frame_columns, [=](int64_t begin, int64_t end) {
      (void)source;
      with_dtype(work.dtype, [&](auto zero) { work.copy_rows<decltype(zero)>(begin, end); });
    });
    return frame;
  }
  // The threads divide the longer side of the zero-padded result, in blocks of kSide rows or columns.
  const bool wide = frame_columns >= frame_rows;
  const int64_t side = wide ? frame_columns : frame_rows;
  loops->add(ceil_div(side, kSide), kSide * (wide ? frame_rows : frame_columns), [=](int64_t begin, int64_t end) {
    (void)source;
    with_dtype(work.dtype, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t first = begin * kSide; first < min_i64(end * kSide, side); first += kSide) {
        const int64_t width = min_i64(kSide, side - first);
        wide ? work.transpose_rows<T>(first, width, frame_rows) : work.transpose_columns<T>(first, width);
      }
    });
  });
  return frame;
}

Tensor packed(const char* op, const char* argument, const Tensor& matrix, const float* by_row, const float* by_column,
              bool transpose, int64_t frame_rows, int64_t frame_columns) {
  Loops loops;
  const Tensor frame = packed(&loops, op, argument, matrix, by_row, by_column, transpose, frame_rows, frame_columns);
  loops.run(kConvertGrain);
  return frame;
}

Tensor unpacked(Loops* loops, const char* op, const char* argument, const LateSums& sums, float by,
                const float* by_column, const float* by_rank, bool transpose, const Tensor& like) {
  const int64_t ranks = sums.total.size(0), columns = sums.total.size(1);
  const Tensor out = empty({like.size(0), like.size(1)}, like.scalar_type());
  const DType dtype = dtype_of(op, argument, like);
  void* data = out.mutable_data_ptr();
  loops->add(ceil_div(columns, kSide), kSide * ranks * (1 + sums.count), [=](int64_t begin, int64_t end) {
    const float* in = sums.total.const_data_ptr<float>();
    const float* more = sums.count > 0 ? sums.held.const_data_ptr<float>() : nullptr;
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      T* to = static_cast<T*>(data);
      float row[kSide];
      // The cache lines of the result that one block of columns touches stay in L1 while all ranks are written.
      for (int64_t first = begin * kSide; first < min_i64(end * kSide, columns); first += kSide) {
        const int64_t width = min_i64(kSide, columns - first);
        for (int64_t rank = 0; rank < ranks; ++rank) {
          const int64_t at = rank * columns + first;
          std::copy_n(in + at, width, row);
          for (int64_t i = 0; i < sums.count; ++i) {
            const float* from = more + (sums.first + i) * ranks * columns + at;
            for (int64_t j = 0; j < width; ++j) row[j] += from[j];
          }
          const float factor = by_rank != nullptr ? by * by_rank[rank] : by;
          if (by_column != nullptr)
            for (int64_t j = 0; j < width; ++j) row[j] *= by_column[first + j];
          for (int64_t j = 0; j < width; ++j) row[j] *= factor;
          if (transpose)
            for (int64_t j = 0; j < width; ++j) to[(first + j) * ranks + rank] = from_float<T>(row[j]);
          else
            for (int64_t j = 0; j < width; ++j) to[at + j] = from_float<T>(row[j]);
        }
      }
    });
  });
  return out;
}

Tensor unpacked(const char* op, const char* argument, const Tensor& sums, float by, const float* by_column,
                const float* by_rank, bool transpose, const Tensor& like) {
  Loops loops;
  const Tensor out = unpacked(&loops, op, argument, LateSums{sums, Tensor()}, by, by_column, by_rank, transpose, like);
  loops.run(kConvertGrain);
  return out;
}

Tensor padded_vector(const char* op, const char* argument, const Tensor& values, int64_t length) {
  if (values.scalar_type() == ScalarType::Float && values.numel() == length && values.is_contiguous()) return values;
  const Tensor row = as_shape(as_contiguous(values), {1, values.numel()});
  return packed(op, argument, row, nullptr, nullptr, false, 1, length);
}

Tensor lane_strips(Loops* loops, const char* op, const char* argument, const Tensor& matrix) {
  const Tensor source = as_contiguous(matrix);
  const int64_t rank = source.size(0), columns = source.size(1), strips = ceil_div(columns, kStrip);
  const Tensor out = empty({strips, rank, kStrip}, ScalarType::Float);
  const DType dtype = dtype_of(op, argument, source);
  float* data = out.mutable_data_ptr<float>();
  loops->add(strips, rank * kStrip, [=](int64_t begin, int64_t end) {
    with_dtype(dtype, [&](auto zero) {
      const auto* from = static_cast<const decltype(zero)*>(source.const_data_ptr());
      float* to = data + begin * rank * kStrip;
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t width = min_i64(kStrip, columns - strip * kStrip);
        for (int64_t r = 0; r < rank; ++r, to += kStrip) {
          for (int64_t j = 0; j < width; ++j) to[j] = to_float(from[r * columns + strip * kStrip + j]);
          std::fill(to + width, to + kStrip, 0.0f);
        }
      }
    });
  });
  return out;
}

void lane_strips_of_rows(const float* m, int64_t rank, int64_t columns, int64_t first, int64_t last, float* strips) {
  for (int64_t strip = first; strip < last; ++strip)
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t j = 0; j < kStrip; ++j) {
        const int64_t column = strip * kStrip + j;
        strips[(strip * rank + r) * kStrip + j] = column < columns ? m[column * rank + r] : 0.0f;
      }
}

Tensor float_vector(const char* op, const char* argument, const Tensor& values, int64_t numel) {
  STD_TORCH_CHECK(values.numel() == numel, op, ": ", argument, " has ", values.numel(), " elements, wanted ", numel);
  return padded_vector(op, argument, values, numel);
}

}  // namespace peft_ext
