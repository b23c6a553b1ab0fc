// The emulated machine, one per OS thread: threads of a block as fibers, shared memory, and who touched which byte
// when.
//
// Order of accesses. A stamp says when a thread touched a byte of shared memory: the block's epoch, which every
// sync_threads advances, the warp's epoch within it, which every sync_warp advances, and the thread. Two accesses are
// ordered if they are of one thread, of different block epochs, or of one warp and different warp epochs; shuffles,
// votes and mma order nothing, as CUDA promises nothing of them. Epochs go on over blocks and launches, so a stamp
// older than the block's start means "not written", and nothing is cleared. One pair of stamps serves four bytes until
// a smaller access splits them.
//
// Global memory: for each element of a range that may be written, which block of the launch wrote and which read it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "emulator/fiber.h"
#include "emulator/launch.h"

namespace peft_ext {
namespace emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kPageBytes = 4096;  // a page that nothing may touch lies below each stack

constexpr size_t kMaxStaticShared = 48 * 1024;
constexpr size_t kMaxShared = 99 * 1024;  // of a block: what every architecture from 8.0 on has
constexpr size_t kSharedGap = 128;        // between declarations, so that a step past one is found
constexpr int kMaxDeclarations = 32;
constexpr size_t kArenaBytes = kMaxShared + (kMaxDeclarations + 1) * 2 * kSharedGap;

enum class Access { kRead, kWrite, kAtomic };

// What a thread can wait for.
enum class Wait : uint8_t {
  kNone,
  kThreads,
  kWarp,
  kShuffle,
  kShuffleXor,
  kBallot,
  kLdmatrix,
  kLdmatrixTrans,
  kMmaBf16,
  kMmaF16
};

// A stamp: | block epoch 28 | warp epoch 22 | thread 10 | flags 4 |
constexpr int kThreadShift = 4;
constexpr int kWarpEpochShift = 14;
constexpr int kEpochShift = 36;
constexpr uint64_t kMaxEpoch = (uint64_t{1} << 28) - 2;
constexpr uint64_t kMaxWarpEpoch = (uint64_t{1} << 22) - 1;
constexpr uint64_t kSplit = 1;      // of a write: the four bytes have stamps of their own
constexpr uint64_t kInFlight = 2;   // of a write: a cp.async not waited for
constexpr uint64_t kByAtomic = 4;   // of a write
constexpr uint64_t kManyLanes = 1;  // of a read: of this warp and epoch there was more than one thread
constexpr uint64_t kManyWarps = 2;  // of a read: of this block epoch there was more than one warp
constexpr uint64_t kFlags = 15;

inline uint64_t epoch_of(uint64_t stamp) { return stamp >> kEpochShift; }
inline int thread_of(uint64_t stamp) { return static_cast<int>(stamp >> kThreadShift & 1023); }
inline int warp_of(uint64_t stamp) { return thread_of(stamp) / kLanes; }
inline uint64_t warp_epoch_of(uint64_t stamp) { return stamp >> kWarpEpochShift & kMaxWarpEpoch; }

struct Stamps {
  uint64_t write;
  uint64_t read;
};

// Stamps of global elements: base + kFirstBlock + block, or base + kManyBlocks; the top bit of a writer: by an atomic.
constexpr uint32_t kManyBlocks = 1;
constexpr uint32_t kFirstBlock = 2;
constexpr uint32_t kAtomicWriter = 0x80000000u;

struct PendingCopy {
  size_t offset;  // in the arena
  const void* from;
  int bytes;
  bool take;
  uint32_t group;
};

struct Fiber {
  Execution execution;
  char* stack;
  int thread;
  Wait wait;
  const void* site;  // where it waits
  // A collective's operands and result.
  uint32_t value;
  int argument;
  const void* row;
  uint32_t* matrices;
  float* c;
  const uint32_t* a;
  const uint32_t* b;
  // cp.async
  PendingCopy* copies;
  int first_copy, copy_count, copy_capacity;
  uint32_t group;
};

struct Warp {
  uint32_t lanes;    // that exist
  uint32_t ready;    // that can run
  uint32_t arrived;  // at the collective
  uint32_t exited;
  Wait collective;
  uint64_t epoch;
};

struct Declaration {
  const void* key;
  const char* name;
  size_t begin, bytes;  // in the arena
};

struct Machine {
  // The launch.
  Memory* memory;
  void (*invoke)(const void*);
  const void* call;
  int64_t grid[3];
  int64_t block[3];
  uint32_t block_stamp;
  int threads, warps;
  const Memory::Range* last_range;
  uint8_t* published;  // of each block: it wrote before a threadfence and told so by an atomic after it; null: none did
  bool fenced, acquired;
  // Its shared memory: dynamic first, then static in order of appearance.
  Declaration declarations[kMaxDeclarations + 1];
  int declaration_count;
  size_t static_bytes, static_end;

  // The block.
  uint64_t epoch;
  uint64_t block_start;  // its first epoch, as a stamp
  int exited, at_barrier;
  Warp warp[kMaxWarps];
  Fiber fibers[kMaxThreads];
  Execution host;
  const void* fault_site;
  bool faulted;
  char fault[1024];

  char* arena;
  Stamps* words;   // of four bytes of the arena
  Stamps* bytes;   // of each, where kSplit says so
  uint8_t* owner;  // of four bytes: the declaration's index + 1; 0: none
};

// What a hook looks at first.
struct Current {
  uintptr_t stack;  // the running fiber's
  uintptr_t arena;
  uint64_t now;  // its stamp
  bool active;   // a kernel runs
  Fiber* fiber;
  Machine* machine;
};
extern __thread Current current __attribute__((tls_model("initial-exec")));

// Ends the launch with a message; where: `site`, an address of code.
[[noreturn]] void fault(const void* site, const char* format, ...) __attribute__((format(printf, 2, 3)));

void shared_access(size_t offset, size_t bytes, Access access, const void* site);
void global_access(uintptr_t address, size_t bytes, Access access, const void* site);

inline void check_access(const void* data, size_t bytes, Access access, const void* site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  if (address - current.stack < kStackBytes) return;
  if (!current.active) return;
  const size_t offset = address - current.arena;
  if (offset < kArenaBytes) {
    shared_access(offset, bytes, access, site);
  } else {
    global_access(address, bytes, access, site);
  }
}

// Matrices of a whole warp, from and to its lanes' registers.
void multiply_bf16(Fiber* lanes);
void multiply_f16(Fiber* lanes);
void load_matrices(Fiber* lanes, bool transposed);

// report.cpp: a function's name without namespaces and arguments; "file:line" of code, or an empty text.
void describe_function(const void* function, char* text, size_t bytes);
void describe_site(const void* site, char* text, size_t bytes);
bool in_read_only_data(uintptr_t address, size_t bytes);

}  // namespace emulator
}  // namespace peft_ext
