// The grid and the block of a launch of a CUDA kernel.
#pragma once

#include <stdint.h>

namespace peft_ext {

// The grid of a launch: number of blocks in x, y and z.
struct Grid {
  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
  int64_t x, y, z;
};

// The block of a launch: number of threads, and bytes of dynamic shared memory.
struct Block {
  Block(int threads, int64_t dynamic_shared = 0) : threads(threads), dynamic_shared(dynamic_shared) {}
  int threads;
  int64_t dynamic_shared;
};

}  // namespace peft_ext
