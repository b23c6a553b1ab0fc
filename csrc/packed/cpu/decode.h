// Decodes packed weights on the CPU: whole weights, rows, or only the scales of NF4.
#pragma once

#include "nf4/cpu/nf4_kernels.h"
#include "packed/cpu/format_kernels.h"
#include "weight/frozen_weight.h"

namespace peft_ext {

// Number of NF4 blocks whose scales are decoded at a time.
constexpr int64_t kScaleChunk = 512;

// Gives the scales of any range of an NF4 weight's blocks in float32, and decodes double-quantized scales to float32.
class Scales {
 public:
  explicit Scales(const FrozenWeight& weight);

  // Returns the scales of the blocks [begin, end): a pointer into the weight, or scales decoded into `buffer`.
  const float* decode(int64_t begin, int64_t end, float* buffer) const;

  // Prefetches what a later call `decode(begin, end, ...)` reads, if the scales are double-quantized.
  void prefetch(int64_t begin, int64_t end) const;

 private:
  bool nested_;
  const float* plain_ = nullptr;
  const float* offset_ = nullptr;  // the offset of double-quantized scales, read by each call of `decode`
  Nf4Scales held_{};
};

// Returns [N, K] in `type`: the dense weight itself, or the decoded packed weight.
Tensor dense_weight(const char* op, const FrozenWeight& weight, ScalarType type);

// Returns the dense weight [N, K] in `type`, for one product within a call. A packed weight is decoded into the calling
// thread's scratch, which the next call of working_weight overwrites.
Tensor working_weight(const char* op, const FrozenWeight& weight, ScalarType type);

// Returns the number of scales of a weight that have to be decoded: 0 unless the weight is double-quantized NF4.
int64_t nested_scales(const FrozenWeight& weight);

// Returns the float32 scales of all blocks of an NF4 weight: the weight's own scales, or scales decoded into `room`.
const float* all_scales(const FrozenWeight& weight, float* room);

// Decodes the flat elements [begin, end) of an NF4 weight on the calling thread. `room` must have space for all NF4
// blocks that contain an element of the range. Returns the address of element `begin` in `room`.
const void* dequantize_range(const FrozenWeight& weight, int64_t begin, int64_t end, DType dtype, void* room);

// Returns the number of elements that decode_rows needs in `room` for `rows` rows of a packed weight.
int64_t room_of_rows(const FrozenWeight& weight, int64_t rows);

// Decodes the rows [begin, end) of a packed weight on the calling thread. `room` must have space for room_of_rows
// elements. Returns the address of the first row in `room`; the rows are contiguous.
const void* decode_rows(const FrozenWeight& weight, int64_t begin, int64_t end, DType dtype, void* room);

// Returns the rows [begin, end) of a packed weight in `type`, decoded on all threads.
Tensor dequantized_rows(const char* op, const FrozenWeight& weight, int64_t begin, int64_t end, ScalarType type);

}  // namespace peft_ext
