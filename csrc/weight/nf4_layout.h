// The sizes of bitsandbytes' NF4 layout: codes in blocks of one scale, and with double quantization the scales in
// groups of one float32.
#pragma once

#include <stdint.h>

namespace peft_ext {

constexpr int kSmallestBlock = 32, kLargestBlock = 4096;  // elements; a power of two between them
constexpr int kLog2NestedBlock = 8;
constexpr int kNestedBlock = 1 << kLog2NestedBlock;  // scales
constexpr int kNestedCodes = 256;

namespace {

inline bool is_blocksize(int64_t blocksize) {
  return blocksize >= kSmallestBlock && blocksize <= kLargestBlock && (blocksize & (blocksize - 1)) == 0;
}

}  // namespace
}  // namespace peft_ext
