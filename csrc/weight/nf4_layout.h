// Sizes in bitsandbytes' NF4 layout. A block of codes shares one scale. With double quantization, 256 scales share one
// float32 scale.
#pragma once

#include <stdint.h>

namespace peft_ext {

constexpr int kSmallestBlock = 32, kLargestBlock = 4096;  // smallest and largest number of elements in a block
constexpr int kLog2NestedBlock = 8;
constexpr int kNestedBlock = 1 << kLog2NestedBlock;  // number of scales that share one float32 scale
constexpr int kNestedCodes = 256;

namespace {

inline bool is_blocksize(int64_t blocksize) {
  return blocksize >= kSmallestBlock && blocksize <= kLargestBlock && (blocksize & (blocksize - 1)) == 0;
}

}  // namespace
}  // namespace peft_ext
