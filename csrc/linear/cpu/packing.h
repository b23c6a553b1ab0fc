// The small matrices of an adapter as the kernels take them: float32, padded, scaled, transposed, in strips.
#pragma once

#include "cpu/tensor.h"

namespace peft_ext {

// What a thread takes at least of a pass over elements.
constexpr int64_t kPackGrain = 1 << 14;

inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

inline Tensor none(ScalarType type = ScalarType::Float) { return empty({0}, type); }

inline const float* floats(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

// float32 zeros.
Tensor zeros(const std::vector<int64_t>& shape);

// A matrix [rows, columns] of any type as float32 in a zero-padded frame [frame_rows, frame_columns], transposed on the
// way where asked; each element times by_row[row] and by_column[column], where given. Where that is the matrix as it
// lies, itself: not to be written to.
Tensor packed(const char* op, const char* argument, const Tensor& matrix, const float* by_row, const float* by_column,
              bool transpose, int64_t frame_rows, int64_t frame_columns);

// sums [columns, padded rank] float32 -> like [R, columns] (transposed) or [columns, R] in like's type; each element
// times by_column[column] and by_rank[rank], where given.
Tensor unpacked(const char* op, const char* argument, const Tensor& sums, const float* by_column, const float* by_rank,
                bool transpose, const Tensor& like);

// A vector of any type as float32, padded with zeros: itself where it is that already, not to be written to.
Tensor padded_vector(const char* op, const char* argument, const Tensor& values, int64_t length);

// [rank, columns] with rows `stride` apart -> strips [ceil(columns / 16), rank, 16], zeros beyond.
Tensor lane_strips(const float* rows, int64_t rank, int64_t stride, int64_t columns);

// The same from m [columns, stride], whose columns are the ranks.
Tensor lane_strips_of_rows(const float* m, int64_t rank, int64_t stride, int64_t columns);

// out_scale and the like as float32 of so many elements, checked; likewise.
Tensor float_vector(const char* op, const char* argument, const Tensor& values, int64_t numel);

}  // namespace peft_ext
