// Working memory of a thread, kept from call to call: a fresh block of megabytes costs a page fault per 4 KiB, which is
// a tenth of a small layer's time.
#pragma once

#include <stdlib.h>

#include "common/tensor.h"

namespace peft_ext {

// Each is used by one caller at a time, on the thread that asks for it.
enum class Scratch : int { kPanel = 0, kTokens, kMoreTokens, kScales, kRows, kCount };

inline void* scratch(Scratch use, size_t bytes) {
  struct Block {
    void* data = nullptr;
    size_t size = 0;
    ~Block() { free(data); }
  };
  static thread_local Block blocks[static_cast<int>(Scratch::kCount)];
  Block& block = blocks[static_cast<int>(use)];
  if (block.size < bytes) {
    free(block.data);
    block = Block();
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    STD_TORCH_CHECK(posix_memalign(&block.data, 4096, rounded) == 0, "peft_ext: no memory for ", rounded, " bytes");
    block.size = rounded;
    advise_huge_pages(block.data, rounded);
  }
  return block.data;
}

}  // namespace peft_ext
