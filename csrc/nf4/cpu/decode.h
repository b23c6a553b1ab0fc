// NF4 weights on the CPU, decoded: whole, by rows, by runs, or their scales alone.
#pragma once

#include "nf4/cpu/nf4_kernels.h"
#include "weight/frozen_weight.h"

namespace peft_ext {

// Elements a thread takes at least: about 20 microseconds of work.
constexpr int64_t kDecodeGrain = 1 << 16;
// Blocks whose scales are decoded together.
constexpr int64_t kScaleChunk = 512;

// The float32 scales of any range of blocks, double-quantized ones decoded.
class Scales {
 public:
  explicit Scales(const FrozenWeight& weight);

  // The scales of blocks [begin, end), in buffer, which has room for them, or where they were.
  const float* decode(int64_t begin, int64_t end, float* buffer) const;

 private:
  bool nested_;
  const float* plain_ = nullptr;
  Nf4Scales held_{};
};

// [N, K] in `type`: the dense weight itself, or the NF4 weight dequantized.
Tensor dense_weight(const char* op, const FrozenWeight& weight, ScalarType type);

// The same for one product within a call: an NF4 weight is decoded into the calling thread's scratch, where the next
// one is decoded, too.
Tensor working_weight(const char* op, const FrozenWeight& weight, ScalarType type);

// How many scales of a weight have to be decoded: those of an NF4 weight with double quantization.
int64_t nested_scales(const FrozenWeight& weight);

// The scales of all blocks of an NF4 weight in float32: its own, or decoded into `room`, which has room for them.
const float* all_scales(const FrozenWeight& weight, float* room);

// Elements [begin, end) of an NF4 weight's flat tensor, decoded by the calling thread into `room`, which holds the
// blocks that they touch; returns where element `begin` lies in it.
const void* dequantize_range(const FrozenWeight& weight, int64_t begin, int64_t end, DType dtype, void* room);

// Rows [begin, end) of an NF4 weight in `type`, decoded over all threads.
Tensor dequantized_rows(const char* op, const FrozenWeight& weight, int64_t begin, int64_t end, ScalarType type);

}  // namespace peft_ext
