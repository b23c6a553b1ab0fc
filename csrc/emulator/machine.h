// The state of the emulated machine: the threads of the running block as fibers, shared memory, and a record of the
// accesses to each byte. Each OS thread has its own machine.
//
// Order of accesses. A stamp tells when a thread accessed a byte of shared memory. A stamp holds the block's epoch,
// which every sync_threads increases; the warp's epoch within the block's epoch, which every sync_warp increases; and
// the thread's number. Two accesses are ordered if they are by one thread, in different block epochs, or by one warp in
// different warp epochs. Shuffles, votes and mma do not order accesses, because CUDA does not promise any order for
// them. Epochs keep increasing from block to block and from launch to launch, so that a write stamp from before the
// running block's start means that the block has not written the byte. Stamps are cleared before a block if
// half of the epochs that a stamp can hold are used. Four bytes share one pair of stamps (write and read) until a
// smaller access splits the pair.
//
// Global memory has two stamps for each element of a writable range: which block of the launch wrote the element, and
// which block read the element.
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
constexpr size_t kPageBytes = 4096;  // size of the inaccessible page below each stack

constexpr size_t kMaxStaticShared = 48 * 1024;
// bytes of shared memory that a block may use on every GPU of compute capability 8.0 and later
constexpr size_t kMaxShared = 99 * 1024;
// smallest number of unused bytes after each declaration of shared memory, so that an access just beyond a declaration
// is a fault
constexpr size_t kSharedGap = 128;
constexpr int kMaxDeclarations = 32;
constexpr size_t kArenaBytes = kMaxShared + (kMaxDeclarations + 1) * 2 * kSharedGap;

enum class Access { kRead, kWrite, kAtomic };

// What an emulated thread waits for.
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

// Bits of a stamp: | block epoch 28 | warp epoch 22 | thread 10 | flags 4 |
constexpr int kThreadShift = 4;
constexpr int kWarpEpochShift = 14;
constexpr int kEpochShift = 36;
constexpr uint64_t kMaxEpoch = (uint64_t{1} << 28) - 2;
constexpr uint64_t kMaxWarpEpoch = (uint64_t{1} << 22) - 1;
constexpr uint64_t kSplit = 1;      // in a write stamp: each of the four bytes has its own stamps
constexpr uint64_t kInFlight = 2;   // in a write stamp: the write is a cp.async that no wait has completed
constexpr uint64_t kByAtomic = 4;   // in a write stamp: an atomic operation wrote the bytes
constexpr uint64_t kManyLanes = 1;  // in a read stamp: more than one thread of this warp read in this epoch
constexpr uint64_t kManyWarps = 2;  // in a read stamp: more than one warp read in this block epoch
constexpr uint64_t kFlags = 15;

inline uint64_t epoch_of(uint64_t stamp) { return stamp >> kEpochShift; }
inline int thread_of(uint64_t stamp) { return static_cast<int>(stamp >> kThreadShift & 1023); }
inline int warp_of(uint64_t stamp) { return thread_of(stamp) / kLanes; }
inline uint64_t warp_epoch_of(uint64_t stamp) { return stamp >> kWarpEpochShift & kMaxWarpEpoch; }

struct Stamps {
  uint64_t write;
  uint64_t read;
};

// The stamp of an element of global memory is base + kFirstBlock + (number of the block) if one block of the launch
// accessed the element, and base + kManyBlocks if several blocks did. The top bit of a write stamp marks an atomic.
constexpr uint32_t kManyBlocks = 1;
constexpr uint32_t kFirstBlock = 2;
constexpr uint32_t kAtomicWriter = 0x80000000u;

struct PendingCopy {
  size_t offset;  // offset of the destination in the block's shared memory
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
  const void* site;  // code address at which the thread waits
  // The operands and the result of the collective that the fiber takes part in.
  uint32_t value;
  int argument;
  const void* row;
  uint32_t* matrices;
  float* c;
  const uint32_t* a;
  const uint32_t* b;
  // The fiber's cp.async copies that no wait has completed.
  PendingCopy* copies;
  int first_copy, copy_count, copy_capacity;
  uint32_t group;
};

struct Warp {
  uint32_t lanes;    // mask of the lanes that the warp has
  uint32_t ready;    // mask of the lanes that can run
  uint32_t arrived;  // mask of the lanes that wait at `collective`
  uint32_t exited;
  Wait collective;
  uint64_t epoch;
};

struct Declaration {
  const void* key;
  const char* name;
  size_t begin, bytes;  // begin: offset of the declaration in shared memory
};

struct Machine {
  Memory* memory;
  void (*invoke)(const void*);
  const void* call;
  int64_t grid[3];
  int64_t block[3];
  uint32_t block_stamp;
  int threads, warps;
  const Memory::Range* last_range;
  // For each block of the launch: 1 if the block did an atomic after a threadfence, and thereby published its earlier
  // accesses. `published` is null until a block does an atomic after a threadfence.
  uint8_t* published;
  bool fenced, acquired;  // whether the running block has called threadfence, and has done an atomic
  // The shared memory of the launch: dynamic memory first, then static declarations in the order of their first use.
  Declaration declarations[kMaxDeclarations + 1];
  int declaration_count;
  size_t static_bytes, static_end;

  uint64_t epoch;
  uint64_t block_start;  // the smallest stamp of the running block
  int exited, at_barrier;
  Warp warp[kMaxWarps];
  Fiber fibers[kMaxThreads];
  Execution host;
  const void* fault_site;
  bool faulted;
  char fault[1024];

  char* arena;
  Stamps* words;   // stamps of each four bytes of `arena`, the block's shared memory
  Stamps* bytes;   // stamps of each byte of `arena`, used where the write stamp in `words` has kSplit
  uint8_t* owner;  // for each four bytes of `arena`: 1 + index of the declaration, or 0 outside of declarations
};

// The state of the emulator that the hooks need at every access.
struct Current {
  uintptr_t stack;  // address of the running fiber's stack
  uintptr_t arena;
  uint64_t now;  // stamp that an access by the running fiber gets
  bool active;   // whether an emulated kernel is running
  Fiber* fiber;
  Machine* machine;
};
extern __thread Current current __attribute__((tls_model("initial-exec")));

// Ends the launch of the emulated kernel with an error message that `format` gives. `site` is the code address of the
// fault.
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

// The matrix instructions of a whole warp. `lanes` points to the warp's 32 fibers, which hold the operands.
void multiply_bf16(Fiber* lanes);
void multiply_f16(Fiber* lanes);
void load_matrices(Fiber* lanes, bool transposed);

// Functions in report.cpp. describe_function writes a function's name without the namespace peft_ext and without the
// list of parameters. describe_site writes "file:line" of a code address, or an empty text.
void describe_function(const void* function, char* text, size_t bytes);
void describe_site(const void* site, char* text, size_t bytes);
bool in_read_only_data(uintptr_t address, size_t bytes);

}  // namespace emulator
}  // namespace peft_ext
