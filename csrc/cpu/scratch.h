// Working memory of a thread, kept from call to call: a fresh block of megabytes costs a page fault per 4 KiB, which is
// a tenth of a small layer's time. A large one is given back when the call ends: there the faults are little beside the
// product, and a thread would hold on to the longest batch it ever saw.
#pragma once

#include <stdlib.h>

#include "cpu/tensor.h"

namespace peft_ext {

// Each is used by one caller at a time, on the thread that asks for it.
enum class Scratch : int { kPanel = 0, kTokens, kMoreTokens, kScales, kRows, kWeight, kCount };

// Of a block that outlives its call. A linear layer's kPanel and kRows are kPanelStep rows of W at most, twice where
// they are turned as well (kDroppedDepth), so that they stay below it.
constexpr size_t kKeptScratchBytes = size_t{32} << 20;

struct ScratchBlock {
  void* data = nullptr;
  size_t size = 0;

  ~ScratchBlock() { free(data); }
  void release() {
    free(data);
    data = nullptr;
    size = 0;
  }
};

inline ScratchBlock& scratch_block(Scratch use) {
  static thread_local ScratchBlock blocks[static_cast<int>(Scratch::kCount)];
  return blocks[static_cast<int>(use)];
}

inline void* scratch(Scratch use, size_t bytes) {
  ScratchBlock& block = scratch_block(use);
  if (block.size < bytes) {
    block.release();
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    STD_TORCH_CHECK(posix_memalign(&block.data, 4096, rounded) == 0,
                    "DefaultCPUAllocator: can't allocate memory: peft_ext wanted ", rounded, " bytes");
    block.size = rounded;
    advise_huge_pages(block.data, rounded);
  }
  return block.data;
}

// Stands in a call whose scratch may be of any size: the calling thread's large blocks end with it.
struct ScratchOfCall {
  ScratchOfCall() = default;
  ScratchOfCall(const ScratchOfCall&) = delete;
  ScratchOfCall& operator=(const ScratchOfCall&) = delete;
  ~ScratchOfCall() {
    for (int use = 0; use < static_cast<int>(Scratch::kCount); ++use)
      if (ScratchBlock& block = scratch_block(static_cast<Scratch>(use)); block.size > kKeptScratchBytes)
        block.release();
  }
};

}  // namespace peft_ext
