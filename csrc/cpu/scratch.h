// Scratch memory that a thread keeps from one call of an operator to the next call. A new block of megabytes costs a
// page fault per 4 KiB, about a tenth of a small layer's time. Calls that may need a block larger than
// kKeptScratchBytes release such a block at the end of the call (ScratchOfCall): the page faults of a large block cost
// little compared with the call's products, and otherwise a thread would keep memory for the longest batch that the
// thread has computed. release_scratch() releases the blocks of all threads that are in no call. This file does not
// depend on torch.
#pragma once

#include <cstddef>

namespace peft_ext {

// On a thread, no two running functions use the block of the same Scratch value. The thread that calls an operator may
// have a block for each Scratch value. The other threads of a parallel loop have blocks for the uses kPanel and kRows,
// and for every use if they compute whole calls of a layer (each_run in linear/cpu/runs.h).
enum class Scratch : int { kPanel = 0, kTokens, kMoreTokens, kScales, kRows, kWeight, kLayer, kCount };

// Largest size of a block that outlives its call. The kPanel block of a linear layer holds panels of W in 512 KiB, and
// if W has many columns also the float32 sums of these panels. If dropout also acts on the input of the base layer, the
// kPanel block holds kPanelStep rows or columns of W, and up to a depth of kDroppedDepth also their transpose; such a
// block exceeds kKeptScratchBytes only for layers of hundreds of thousands of features.
constexpr size_t kKeptScratchBytes = size_t{32} << 20;

// Returns the calling thread's scratch block for `use`, of at least `bytes` bytes. The thread must be in a call of an
// operator (ScratchInUse). The block is valid until the call ends, or until the thread gets a larger block for the same
// use.
void* scratch(Scratch use, size_t bytes);

// Releases the calling thread's scratch block for `use` if the block is larger than kKeptScratchBytes.
void release_large_scratch(Scratch use);

// A call that may need scratch of any size holds a ScratchOfCall object. The destructor of ScratchOfCall releases the
// calling thread's large blocks.
struct ScratchOfCall {
  ScratchOfCall() = default;
  ScratchOfCall(const ScratchOfCall&) = delete;
  ScratchOfCall& operator=(const ScratchOfCall&) = delete;
  ~ScratchOfCall() {
    for (int use = 0; use < static_cast<int>(Scratch::kCount); ++use) release_large_scratch(static_cast<Scratch>(use));
  }
};

// While a ScratchInUse object exists, release_scratch() does not release the calling thread's blocks.
struct ScratchInUse {
  ScratchInUse();
  ScratchInUse(const ScratchInUse&) = delete;
  ScratchInUse& operator=(const ScratchInUse&) = delete;
  ~ScratchInUse();
};

// Releases the blocks of all threads that are in no call of an operator. Returns the number of released bytes.
size_t release_scratch();

// Returns the number of bytes in the blocks of all threads.
size_t kept_scratch();

}  // namespace peft_ext
