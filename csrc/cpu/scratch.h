// Memory that a thread keeps from call to call. A new block of megabytes costs a page fault per 4 KiB, about a tenth of
// a small layer's time. A block above kKeptScratchBytes is released at the end of the call: the page faults of a large
// block cost little compared with the call's products, and otherwise a thread would keep memory for the longest batch
// that the thread ever saw.
#pragma once

#include <stdlib.h>

#include "cpu/tensor.h"

namespace peft_ext {

// Uses of scratch memory. Each use has one caller at a time on a thread.
enum class Scratch : int { kPanel = 0, kTokens, kMoreTokens, kScales, kRows, kWeight, kCount };

// Largest size of a block that outlives its call. kPanel and kRows of a linear layer hold at most kPanelStep rows of W,
// or twice as much if the rows are stored transposed too (kDroppedDepth), and so stay below this size.
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

// An object that lives during a call whose scratch may have any size. The destructor releases the calling thread's
// large blocks.
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
