// Converts the small matrices of an adapter for the kernels: to float32, padded, scaled, transposed, or in strips (see
// tiles/tiles.h).
#pragma once

#include "cpu/tensor.h"
#include "cpu/threads.h"

namespace peft_ext {

// The smallest number of elements that one thread computes in an elementwise pass.
constexpr int64_t kPackGrain = 1 << 14;
// The smallest number of elements of small matrices that a thread converts: to convert fewer elements takes less time
// than to wake a thread.
constexpr int64_t kConvertGrain = 1 << 15;

inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

inline Tensor none(ScalarType type = ScalarType::Float) { return empty({0}, type); }

inline const float* floats(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

// Returns a float32 tensor of zeros.
Tensor zeros(const std::vector<int64_t>& shape);

// Converts a matrix [rows, columns] of float32, bfloat16 or float16 to float32, zero-padded to [frame_rows,
// frame_columns], and transposed if `transpose` is true. Each element is multiplied by by_row[row] and by
// by_column[column], if these pointers are not null. If the matrix needs no conversion, packed() returns the matrix
// itself, which must not be written to. The packed() with the argument `loops` does not fill the result, but adds to
// `loops` the loops that fill the result; by_row and by_column must stay valid until the caller has run the loops.
Tensor packed(const char* op, const char* argument, const Tensor& matrix, const float* by_row, const float* by_column,
              bool transpose, int64_t frame_rows, int64_t frame_columns);
Tensor packed(Loops* loops, const char* op, const char* argument, const Tensor& matrix, const float* by_row,
              const float* by_column, bool transpose, int64_t frame_rows, int64_t frame_columns);

// Sums [R, columns] float32 whose last additions are still to be done: the sums are total + held[first] + held[first +
// 1] + ..., with `count` additions in this order.
struct LateSums {
  Tensor total;  // [R, columns]
  Tensor held;   // [any, R, columns]
  int64_t first = 0, count = 0;
};

// Converts sums [R, columns] to like's dtype and shape: [columns, R] if `transpose` is true, otherwise [R, columns].
// Each element is multiplied by `by`, and by by_column[column] and by_rank[rank], if these pointers are not null. The
// unpacked() with the argument `loops` does not fill the result, but adds to `loops` the loops that fill the result;
// by_column and by_rank must stay valid until the caller has run the loops.
Tensor unpacked(const char* op, const char* argument, const Tensor& sums, float by, const float* by_column,
                const float* by_rank, bool transpose, const Tensor& like);
Tensor unpacked(Loops* loops, const char* op, const char* argument, const LateSums& sums, float by,
                const float* by_column, const float* by_rank, bool transpose, const Tensor& like);

// Returns a vector as float32, zero-padded to `length` elements. If the vector needs no conversion, padded_vector
// returns the vector itself, which must not be written to.
Tensor padded_vector(const char* op, const char* argument, const Tensor& values, int64_t length);

// Adds to `loops` the loops that convert a matrix [R, columns] to zero-padded float32 strips [ceil(columns / 16), R,
// 16], and returns the strips.
Tensor lane_strips(Loops* loops, const char* op, const char* argument, const Tensor& matrix);

// Writes the strips [first, last) of the transpose of m [columns, rank], in the layout that lane_strips returns.
void lane_strips_of_rows(const float* m, int64_t rank, int64_t columns, int64_t first, int64_t last, float* strips);

// Checks that a vector such as out_scale has `numel` elements, and returns the vector as float32. The returned tensor
// may be `values` itself.
Tensor float_vector(const char* op, const char* argument, const Tensor& values, int64_t numel);

}  // namespace peft_ext
