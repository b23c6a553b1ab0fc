// The scratch blocks of all threads, in a list without locks. A thread claims its own blocks at the first use of a
// block in a call; release_scratch() claims the blocks of one thread after another. An entry of the list is never
// removed, and a new thread takes over the entry of an ended thread. Therefore a forked process also finds every
// scratch block in the list. A claim that another thread held at the time of the fork is never given back in the forked
// process, see after_fork.
#include "cpu/scratch.h"

#include <stdlib.h>
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <atomic>
#include <thread>

#include "cpu/tensor.h"

namespace peft_ext {
namespace {

constexpr int kUses = static_cast<int>(Scratch::kCount);
std::atomic<size_t> kept{0};

struct Block {
  void* data = nullptr;
  size_t size = 0;

  void release() {
    free(data);
    kept.fetch_sub(size, std::memory_order_relaxed);
    data = nullptr;
    size = 0;
  }
};

struct ThreadScratch {
  Block blocks[kUses];
  std::atomic<bool> claimed{false};  // whether a call of the thread, or release_scratch(), uses the blocks
  std::atomic<bool> owned{true};     // whether a running thread uses this entry
  ThreadScratch* next = nullptr;

  bool try_claim() { return !claimed.exchange(true, std::memory_order_acquire); }
  void unclaim() { claimed.store(false, std::memory_order_release); }
  void release() {
    for (Block& block : blocks) block.release();
  }
};

std::atomic<ThreadScratch*> all{nullptr};

thread_local ThreadScratch* own = nullptr;  // this thread's entry in the list, or null if the thread has none
thread_local int depth = 0;                 // number of ScratchInUse objects that this thread has now
thread_local bool in_use = false;           // whether this thread has claimed its own blocks

// The destructor runs when a thread ends: it releases the thread's blocks, and makes the thread's entry free for
// another thread.
struct EndOfThread {
  ThreadScratch* scratch = nullptr;

  ~EndOfThread() {
    if (scratch == nullptr) return;
    while (!in_use && !scratch->try_claim()) std::this_thread::yield();
    scratch->release();
    scratch->unclaim();
    scratch->owned.store(false, std::memory_order_release);
    own = nullptr;
    in_use = false;
  }
};

// Runs in a forked process, in the thread that forked. If another thread was in release_scratch() and had claimed the
// entry of this thread, this claim is never given back, and this thread takes a new entry.
void after_fork() {
  if (own != nullptr && !in_use && own->claimed.load(std::memory_order_relaxed)) own = nullptr;
}

ThreadScratch* take_entry() {
#if !defined(_WIN32)
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
  static_cast<void>(registered);
#endif
  static thread_local EndOfThread end;
  for (ThreadScratch* entry = all.load(std::memory_order_acquire); entry != nullptr; entry = entry->next) {
    bool owned = false;
    if (entry->owned.compare_exchange_strong(owned, true, std::memory_order_acquire)) return end.scratch = entry;
  }
  auto* entry = new ThreadScratch;
  entry->next = all.load(std::memory_order_relaxed);
  while (!all.compare_exchange_weak(entry->next, entry, std::memory_order_release, std::memory_order_relaxed)) {
  }
  return end.scratch = entry;
}

}  // namespace

void* scratch(Scratch use, size_t bytes) {
  if (own == nullptr) own = take_entry();
  if (!in_use) {
    while (!own->try_claim()) std::this_thread::yield();
    in_use = true;
  }
  Block& block = own->blocks[static_cast<int>(use)];
  if (block.size < bytes) {
    block.release();
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    STD_TORCH_CHECK(posix_memalign(&block.data, 4096, rounded) == 0,
                    "DefaultCPUAllocator: can't allocate memory: peft_ext wanted ", rounded, " bytes");
    block.size = rounded;
    kept.fetch_add(rounded, std::memory_order_relaxed);
    advise_huge_pages(block.data, rounded);
  }
  return block.data;
}

void release_large_scratch(Scratch use) {
  if (!in_use) return;
  if (Block& block = own->blocks[static_cast<int>(use)]; block.size > kKeptScratchBytes) block.release();
}

ScratchInUse::ScratchInUse() { ++depth; }

ScratchInUse::~ScratchInUse() {
  if (--depth > 0 || !in_use) return;
  in_use = false;
  own->unclaim();
}

size_t release_scratch() {
  size_t released = 0;
  for (ThreadScratch* entry = all.load(std::memory_order_acquire); entry != nullptr; entry = entry->next) {
    if (!entry->try_claim()) continue;
    for (const Block& block : entry->blocks) released += block.size;
    entry->release();
    entry->unclaim();
  }
#if defined(__GLIBC__)
  // glibc's free() may keep blocks of up to 32 MiB in the heap of the process; malloc_trim gives them back to the
  // system.
  if (released > 0) malloc_trim(0);
#endif
  return released;
}

size_t kept_scratch() { return kept.load(std::memory_order_relaxed); }

}  // namespace peft_ext
