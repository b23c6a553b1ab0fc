// Checks the accesses of emulated kernels to memory. An access to shared memory must be within a declaration, must read
// only bytes that were written, and must be ordered with the accesses of other threads to the same bytes (see
// machine.h), except that two reads or two atomics need no order. An access to global memory must be within a range of
// the launch's Memory object, or read the library's read-only data, and must not conflict with an access of another
// block (see launch.h).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "emulator/launch.h"
#include "emulator/machine.h"

namespace peft_ext {
namespace emulator {

// ---- shared

namespace {

// A position in shared memory for an error message: a declaration's name, and the offset in the declaration.
struct Place {
  const char* name;
  size_t offset;
};

Place place_of(const Machine& machine, size_t offset) {
  const uint8_t owner = machine.owner[offset / 4];
  if (owner == 0) return {"nothing", 0};
  const Declaration& declaration = machine.declarations[owner - 1];
  return {declaration.name, offset - declaration.begin};
}

const char* verb(Access access) {
  return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "adds to";
}

[[noreturn]] __attribute__((noinline, cold)) void fault_race(size_t offset, Access access, uint64_t other, bool wrote,
                                                             const void* site) {
  const Place place = place_of(*current.machine, offset);
  fault(site, "race: %s shared `%s` + %zu, which thread %d %s with no barrier between", verb(access), place.name,
        place.offset, thread_of(other), wrote ? "wrote" : "read");
}

[[noreturn]] __attribute__((noinline, cold)) void fault_state(size_t offset, Access access, uint64_t write,
                                                              const void* site) {
  const Place place = place_of(*current.machine, offset);
  if (write < current.machine->block_start) {
    fault(site, "%s shared `%s` + %zu, which no thread has written so far", verb(access), place.name, place.offset);
  }
  fault(site, "%s shared `%s` + %zu, where a cp.async of thread %d is in flight", verb(access), place.name,
        place.offset, thread_of(write));
}

[[noreturn]] __attribute__((noinline, cold)) void fault_bounds(size_t offset, size_t bytes, Access access,
                                                               const void* site) {
  const Machine& machine = *current.machine;
  for (int i = 0; i < machine.declaration_count; ++i) {
    const Declaration& at = machine.declarations[i];
    if (offset >= at.begin && offset < at.begin + at.bytes + kSharedGap) {
      fault(site, "%s %zu bytes out of bounds of shared memory, at `%s` + %zu, which has %zu bytes", verb(access),
            bytes, at.name, offset - at.begin, at.bytes);
    }
  }
  fault(site, "%s %zu bytes out of bounds of shared memory", verb(access), bytes);
}

// Returns whether an earlier access in the same block epoch, with the stamp `earlier`, is not ordered before the access
// with the stamp `now`.
inline bool unordered(uint64_t earlier, uint64_t now) {
  if (((earlier ^ now) >> kThreadShift & (kMaxThreads - 1)) == 0) return false;
  return warp_of(earlier) != warp_of(now) || warp_epoch_of(earlier) == warp_epoch_of(now);
}

inline void access_stamps(Stamps& stamps, size_t offset, Access access, const void* site) {
  const uint64_t now = current.now;
  const uint64_t write = stamps.write;
  const uint64_t read = stamps.read;
  const bool fresh = write >= current.machine->block_start;  // whether the running block has written the bytes
  if (access != Access::kWrite && __builtin_expect(!fresh, 0)) fault_state(offset, access, write, site);
  if (fresh) {
    if (__builtin_expect((write & kInFlight) != 0, 0)) fault_state(offset, access, write, site);
    if (epoch_of(write) == epoch_of(now) && unordered(write, now) &&
        !(access == Access::kAtomic && (write & kByAtomic) != 0)) {
      fault_race(offset, access, write, true, site);
    }
  }
  const bool read_lately = epoch_of(read) == epoch_of(now);
  if (access == Access::kRead) {
    if (!read_lately || (((read ^ now) >> kThreadShift & (kMaxThreads - 1)) == 0 && (read & kFlags) == 0)) {
      stamps.read = now;
    } else if ((read & kManyWarps) != 0) {
    } else if (warp_of(read) != warp_of(now)) {
      stamps.read = read | kManyWarps;
    } else {
      stamps.read = warp_epoch_of(read) == warp_epoch_of(now) ? now | kManyLanes : now;
    }
    return;
  }
  if (read_lately) {
    const bool many =
        (read & kManyWarps) != 0 ||
        ((read & kManyLanes) != 0 && (warp_of(read) != warp_of(now) || warp_epoch_of(read) == warp_epoch_of(now)));
    if (many || unordered(read, now)) fault_race(offset, access, read, false, site);
  }
  stamps.write = access == Access::kAtomic ? now | kByAtomic : now;
  stamps.read = 0;
}

__attribute__((noinline)) void access_bytes(Machine& machine, size_t word, size_t begin, size_t end, Access access,
                                            const void* site) {
  Stamps& whole = machine.words[word];
  Stamps* bytes = machine.bytes + 4 * word;
  if ((whole.write & kSplit) == 0) {
    for (int i = 0; i < 4; ++i) bytes[i] = whole;
    whole = {kSplit, 0};
  }
  for (size_t at = begin; at < end; ++at) access_stamps(machine.bytes[at], at, access, site);
  if (access != Access::kRead && end - begin == 4) whole = bytes[0];
}

}  // namespace

void shared_access(size_t offset, size_t bytes, Access access, const void* site) {
  if (bytes == 0) return;
  Machine& machine = *current.machine;
  const size_t end = offset + bytes;
  const uint8_t owner = machine.owner[offset / 4];
  if (owner == 0 || offset < machine.declarations[owner - 1].begin ||
      end > machine.declarations[owner - 1].begin + machine.declarations[owner - 1].bytes) {
    fault_bounds(offset, bytes, access, site);
  }
  size_t at = offset;
  while (at < end) {
    const size_t word = at / 4;
    const size_t stop = end < 4 * (word + 1) ? end : 4 * (word + 1);
    if (stop - at == 4 && (machine.words[word].write & kSplit) == 0) {
      access_stamps(machine.words[word], at, access, site);
    } else {
      access_bytes(machine, word, at, stop, access, site);
    }
    at = stop;
  }
}

// ---- global

Memory::~Memory() {
  for (const Range& range : ranges) {
    free(range.writers);
    free(range.readers);
  }
}

void Memory::add(const void* data, size_t bytes, size_t element, Use use) {
  if (bytes == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  for (Range& range : ranges) {
    // Memory that was added before is not added again, so that the memory keeps its stamps: a later kernel may read
    // what an earlier kernel has written.
    const bool within = begin >= range.begin && begin + bytes <= range.begin + range.bytes;
    if (within && (use == Use::kRead || range.use != Use::kRead)) return;
  }
  Range range{begin, bytes, use, 0, nullptr, nullptr};
  while (range.log2_element < 3 && (size_t{2} << range.log2_element) <= element) ++range.log2_element;
  if (use != Use::kRead) {
    const size_t elements = (bytes >> range.log2_element) + 1;
    range.writers = static_cast<uint32_t*>(calloc(elements, sizeof(uint32_t)));
    range.readers = static_cast<uint32_t*>(calloc(elements, sizeof(uint32_t)));
  }
  if (use == Use::kFresh) memset(const_cast<void*>(data), 0xff, bytes);  // the bytes 0xff are a NaN in every float type
  ranges.push_back(range);
}

namespace {

[[noreturn]] __attribute__((noinline, cold)) void fault_global(uintptr_t address, size_t bytes, Access access,
                                                               const void* site) {
  const Machine& machine = *current.machine;
  if (address < 4096) fault(site, "%s %zu bytes through a null pointer", verb(access), bytes);
  const Memory::Range* nearest = nullptr;
  size_t least = ~size_t{0};
  for (const Memory::Range& range : machine.memory->ranges) {
    if (address - range.begin < range.bytes && address + bytes <= range.begin + range.bytes) {
      fault(site, "%s %zu bytes of global memory that is read only, at byte %zu of a tensor of %zu bytes", verb(access),
            bytes, static_cast<size_t>(address - range.begin), range.bytes);
    }
    const size_t distance = address < range.begin ? range.begin - address : address - range.begin - range.bytes + 1;
    if (distance < least) {
      least = distance;
      nearest = &range;
    }
  }
  if (nearest == nullptr) fault(site, "%s %zu bytes out of bounds of global memory", verb(access), bytes);
  fault(site, "%s %zu bytes out of bounds of global memory; the nearest is byte %lld of a tensor of %zu bytes, %s",
        verb(access), bytes, static_cast<long long>(address) - static_cast<long long>(nearest->begin), nearest->bytes,
        nearest->use == Use::kRead ? "read only" : "writable");
}

inline bool contains(const Memory::Range& range, uintptr_t address, size_t bytes, Access access) {
  return address - range.begin < range.bytes && address - range.begin + bytes <= range.bytes &&
         (access == Access::kRead || range.use != Use::kRead);
}

[[noreturn]] __attribute__((noinline, cold)) void fault_blocks(size_t offset, Access access, uint32_t other, bool wrote,
                                                               const void* site) {
  Machine& machine = *current.machine;
  const uint32_t stamp = other & ~kAtomicWriter;
  char block[64] = "another block";
  if (stamp >= machine.memory->base + kFirstBlock) {
    const int64_t index = stamp - machine.memory->base - kFirstBlock;
    snprintf(block, sizeof(block), "block (%lld, %lld, %lld)", static_cast<long long>(index % machine.grid[0]),
             static_cast<long long>(index / machine.grid[0] % machine.grid[1]),
             static_cast<long long>(index / machine.grid[0] / machine.grid[1]));
  }
  fault(site, "race of blocks: %s byte %zu of a tensor, which %s %s in this launch", verb(access), offset, block,
        wrote ? "wrote" : "read");
}

// Returns whether an access of the running block conflicts with the earlier access that left the stamp `stamp`.
inline bool foreign(const Machine& machine, uint32_t stamp) {
  if (stamp <= machine.memory->base || stamp == machine.block_stamp) return false;
  if (!machine.acquired || machine.published == nullptr) return true;
  // The stamp kManyBlocks names no block, and is no conflict in this branch: several blocks have written the element by
  // atomics, or several blocks have read the element.
  return stamp >= machine.memory->base + kFirstBlock && !machine.published[stamp - machine.memory->base - kFirstBlock];
}

inline void access_element(Machine& machine, const Memory::Range& range, size_t element, Access access,
                           const void* site) {
  const uint32_t mine = machine.block_stamp;
  uint32_t& writer = range.writers[element];
  uint32_t& reader = range.readers[element];
  const uint32_t wrote = writer & ~kAtomicWriter;
  if (__builtin_expect(wrote != mine, 0)) {
    if (access != Access::kWrite && writer == 0 && range.use == Use::kFresh) {
      fault(site, "%s byte %zu of scratch memory, which was never written", verb(access),
            element << range.log2_element);
    }
    if (!(access == Access::kAtomic && (writer & kAtomicWriter) != 0) && foreign(machine, wrote)) {
      fault_blocks(element << range.log2_element, access, writer, true, site);
    }
  }
  if (access == Access::kRead) {
    if (reader != mine) reader = reader > machine.memory->base ? machine.memory->base + kManyBlocks : mine;
    return;
  }
  if (reader != mine && foreign(machine, reader)) {
    fault_blocks(element << range.log2_element, access, reader, false, site);
  }
  if (access == Access::kWrite) {
    writer = mine;
  } else {
    const bool several = wrote > machine.memory->base && wrote != mine;
    writer = (several ? machine.memory->base + kManyBlocks : mine) | kAtomicWriter;
  }
}

}  // namespace

void global_access(uintptr_t address, size_t bytes, Access access, const void* site) {
  if (bytes == 0) return;
  Machine& machine = *current.machine;
  const Memory::Range* range = machine.last_range;
  if (range == nullptr || !contains(*range, address, bytes, access)) {
    range = nullptr;
    for (const Memory::Range& candidate : machine.memory->ranges) {
      // If several ranges contain the access, a writable range is taken, because its elements have stamps.
      if (contains(candidate, address, bytes, access) && (range == nullptr || candidate.use != Use::kRead)) {
        range = &candidate;
      }
    }
    if (range == nullptr) {
      if (access == Access::kRead && in_read_only_data(address, bytes)) return;
      fault_global(address, bytes, access, site);
    }
    machine.last_range = range;
  }
  if (range->use == Use::kRead) return;
  const size_t first = (address - range->begin) >> range->log2_element;
  const size_t last = (address - range->begin + bytes - 1) >> range->log2_element;
  for (size_t element = first; element <= last; ++element) access_element(machine, *range, element, access, site);
}

// ---- places of tensors that a test has marked

static std::atomic<const void*> elsewhere{nullptr}, on_host{nullptr};

bool is_elsewhere(const void* data) { return data != nullptr && data == elsewhere; }
bool is_on_host(const void* data) { return data != nullptr && data == on_host; }

}  // namespace emulator
}  // namespace peft_ext

// Makes is_elsewhere return true for this address and false for all others; a null pointer makes is_elsewhere return
// false for every address.
extern "C" __attribute__((visibility("default"))) void peft_ext_emulated_elsewhere(const void* data) {
  peft_ext::emulator::elsewhere = data;
}

// The same for is_on_host.
extern "C" __attribute__((visibility("default"))) void peft_ext_emulated_on_host(const void* data) {
  peft_ext::emulator::on_host = data;
}
