// Runs the blocks of an emulated launch: the scheduler of fibers (emulated threads), barriers, collectives (operations
// of a whole warp), asynchronous copies and atomics. The lanes of a warp run in order, and each lane runs until it must
// wait. The last lane that arrives at a collective computes the collective for all lanes and continues. If no lane of a
// warp can run, the next warp runs. When no thread of the block can run, all threads must be at the barrier, or all
// threads must have exited; otherwise the launch ends with a fault.
#include "emulator/machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <atomic>
#include <new>
#include <stdexcept>
#include <string>

#include "emulator/device.h"

#if defined(__x86_64__)
asm(R"(
  .text
  .hidden peft_ext_emulator_switch
  .globl peft_ext_emulator_switch
  .type peft_ext_emulator_switch, @function
peft_ext_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size peft_ext_emulator_switch, . - peft_ext_emulator_switch
)");
#endif

#define SITE __builtin_return_address(0)

namespace peft_ext {
namespace emulator {

__thread Current current __attribute__((tls_model("initial-exec")));

namespace {

constexpr size_t kStackStep = kStackBytes + kPageBytes;

void* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

// Owns the emulated machine of an OS thread. The machine is made at the thread's first launch.
struct Owner {
  Machine* machine = nullptr;
  ~Owner() {
    if (machine == nullptr) return;
    for (Fiber& fiber : machine->fibers) free(fiber.copies);
    munmap(machine->fibers[0].stack - kPageBytes, kMaxThreads * kStackStep);
    munmap(machine->arena, kArenaBytes);
    munmap(machine->words, kArenaBytes / 4 * sizeof(Stamps));
    munmap(machine->bytes, kArenaBytes * sizeof(Stamps));
    munmap(machine->owner, kArenaBytes / 4);
    munmap(machine, sizeof(Machine));
  }
};
thread_local Owner owner;

Machine* this_machine() {
  if (owner.machine == nullptr) {
    Machine* machine = static_cast<Machine*>(map(sizeof(Machine)));
    machine->arena = static_cast<char*>(map(kArenaBytes));
    machine->words = static_cast<Stamps*>(map(kArenaBytes / 4 * sizeof(Stamps)));
    machine->bytes = static_cast<Stamps*>(map(kArenaBytes * sizeof(Stamps)));
    machine->owner = static_cast<uint8_t*>(map(kArenaBytes / 4));
    char* stacks = static_cast<char*>(map(kMaxThreads * kStackStep));
    for (int thread = 0; thread < kMaxThreads; ++thread) {
      mprotect(stacks + thread * kStackStep, kPageBytes, PROT_NONE);
      machine->fibers[thread].stack = stacks + thread * kStackStep + kPageBytes;
      machine->fibers[thread].thread = thread;
    }
    owner.machine = machine;
  }
  return owner.machine;
}

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::kNone:
      return "nothing";
    case Wait::kThreads:
      return "sync_threads";
    case Wait::kWarp:
      return "sync_warp";
    case Wait::kShuffle:
      return "shuffle";
    case Wait::kShuffleXor:
      return "shuffle_xor";
    case Wait::kBallot:
      return "ballot or any_lane";
    case Wait::kLdmatrix:
      return "ldmatrix_x4";
    case Wait::kLdmatrixTrans:
      return "ldmatrix_x4_trans";
    case Wait::kMmaBf16:
    case Wait::kMmaF16:
      return "mma_m16n8k16";
  }
  return "";
}

uint64_t stamp(const Machine& machine, const Fiber& fiber) {
  return machine.epoch << kEpochShift | machine.warp[fiber.thread / kLanes].epoch << kWarpEpochShift |
         static_cast<uint64_t>(fiber.thread) << kThreadShift;
}

void enter(Machine& machine, Fiber& fiber) {
  current.fiber = &fiber;
  current.stack = reinterpret_cast<uintptr_t>(fiber.stack);
  current.now = stamp(machine, fiber);
}

void resume(Fiber& fiber) {
  Machine& machine = *current.machine;
  Fiber* from = current.fiber;
  enter(machine, fiber);
  if (&fiber != from) switch_execution(from->execution, fiber.execution);
}

// Returns the first lane of the mask `lanes` at or after `lane`, or the lowest lane of the mask if there is none.
int next_lane(uint32_t lanes, int lane) {
  const uint32_t after = lane < kLanes ? lanes >> lane << lane : 0;
  return __builtin_ctz(after != 0 ? after : lanes);
}

// Ends the launch with the fault that some lanes of the warp wait at a collective, and the remaining lanes can never
// arrive there.
[[noreturn]] void fault_collective(Machine& machine, int warp) {
  const Warp& at = machine.warp[warp];
  const Fiber& waits = machine.fibers[warp * kLanes + __builtin_ctz(at.arrived)];
  const uint32_t away = ~at.arrived;
  const int lane = __builtin_ctz(away);
  const Fiber& other = machine.fibers[warp * kLanes + lane];
  enter(machine, const_cast<Fiber&>(waits));
  if ((at.lanes >> lane & 1) == 0) {
    fault(waits.site, "%s in a warp of %d lanes, wanted 32", name_of(at.collective), __builtin_popcount(at.lanes));
  }
  if (at.exited >> lane & 1) {
    fault(waits.site, "%s reached by %d lanes of 32; thread %d has exited", name_of(at.collective),
          __builtin_popcount(at.arrived), other.thread);
  }
  char where[256];
  describe_site(other.site, where, sizeof(where));
  fault(waits.site, "%s reached by %d lanes of 32; thread %d waits at %s%s%s", name_of(at.collective),
        __builtin_popcount(at.arrived), other.thread, name_of(other.wait), where[0] ? ", " : "", where);
}

// Runs other fibers until this fiber may continue.
void wait(Machine& machine, Fiber& fiber) {
  int warp = fiber.thread / kLanes;
  for (int step = 0; step < machine.warps; ++step) {
    const Warp& at = machine.warp[warp];
    if (at.ready != 0) {
      return resume(machine.fibers[warp * kLanes + next_lane(at.ready, step == 0 ? fiber.thread % kLanes + 1 : 0)]);
    }
    if (at.arrived != 0) fault_collective(machine, warp);
    if (++warp == machine.warps) warp = 0;
  }
  if (machine.exited == machine.threads) {
    current.fiber = nullptr;
    switch_execution(fiber.execution, machine.host);
  }
  // At this point, each thread of the block is at the barrier or has exited.
  if (machine.exited > 0) {
    int at_barrier = 0, gone = -1;
    for (int thread = machine.threads - 1; thread >= 0; --thread) {
      if (machine.fibers[thread].wait == Wait::kThreads) {
        at_barrier = thread;
      } else {
        gone = thread;
      }
    }
    enter(machine, machine.fibers[at_barrier]);
    fault(machine.fibers[at_barrier].site, "sync_threads reached by %d threads of %d; thread %d has exited",
          machine.at_barrier, machine.threads, gone);
  }
  if (++machine.epoch > kMaxEpoch) fault(fiber.site, "too many barriers in one block");
  machine.at_barrier = 0;
  for (int i = 0; i < machine.warps; ++i) {
    machine.warp[i].ready = machine.warp[i].lanes;
    machine.warp[i].epoch = 0;
  }
  for (int thread = 0; thread < machine.threads; ++thread) machine.fibers[thread].wait = Wait::kNone;
  resume(machine.fibers[0]);
}

void collect(Machine& machine, Warp& warp, Wait kind, Fiber* lanes, const void* site) {
  switch (kind) {
    case Wait::kShuffle:
    case Wait::kShuffleXor: {
      uint32_t values[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) values[lane] = lanes[lane].value;
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane].value = values[lanes[lane].argument];
      break;
    }
    case Wait::kBallot: {
      uint32_t votes = 0;
      for (int lane = 0; lane < kLanes; ++lane) votes |= lanes[lane].value << lane;
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane].value = votes;
      break;
    }
    case Wait::kWarp:
      if (++warp.epoch > kMaxWarpEpoch) fault(site, "too many sync_warp between two barriers");
      current.now = stamp(machine, *current.fiber);
      break;
    case Wait::kLdmatrix:
    case Wait::kLdmatrixTrans:
      load_matrices(lanes, kind == Wait::kLdmatrixTrans);
      break;
    case Wait::kMmaBf16:
      multiply_bf16(lanes);
      break;
    case Wait::kMmaF16:
      multiply_f16(lanes);
      break;
    default:
      break;
  }
}

// Lets the running fiber take part in a collective of its warp. The running fiber's fields hold the operands of the
// collective, and afterwards the result.
void arrive(Wait kind, const void* site) {
  Machine& machine = *current.machine;
  Fiber& fiber = *current.fiber;
  const int index = fiber.thread / kLanes;
  Warp& warp = machine.warp[index];
  const uint32_t bit = 1u << (fiber.thread % kLanes);
  if (warp.arrived == 0) {
    warp.collective = kind;
  } else if (__builtin_expect(warp.collective != kind, 0)) {
    const Fiber& other = machine.fibers[index * kLanes + __builtin_ctz(warp.arrived)];
    char where[256];
    describe_site(other.site, where, sizeof(where));
    fault(site, "lanes of a warp meet at different collectives: %s here, and thread %d at %s%s%s", name_of(kind),
          other.thread, name_of(other.wait), where[0] ? ", " : "", where);
  }
  warp.arrived |= bit;
  fiber.site = site;
  if (warp.arrived != ~0u) {
    warp.ready &= ~bit;
    fiber.wait = kind;
    wait(machine, fiber);
    return;
  }
  collect(machine, warp, kind, &machine.fibers[index * kLanes], site);
  warp.arrived = 0;
  warp.ready = warp.lanes;
}

void fiber_main() {
  Machine& machine = *current.machine;
  machine.invoke(machine.call);
  Fiber& fiber = *current.fiber;
  Warp& warp = machine.warp[fiber.thread / kLanes];
  const uint32_t bit = 1u << (fiber.thread % kLanes);
  warp.ready &= ~bit;
  warp.exited |= bit;
  ++machine.exited;
  wait(machine, fiber);
  __builtin_unreachable();
}

void start_block(Machine& machine) {
  if (machine.epoch > kMaxEpoch / 2) {
    // All stamps are reset, so that at least kMaxEpoch / 2 epochs (one for each sync_threads) are left for this block.
    memset(static_cast<void*>(machine.words), 0, kArenaBytes / 4 * sizeof(Stamps));
    memset(static_cast<void*>(machine.bytes), 0, kArenaBytes * sizeof(Stamps));
    machine.epoch = 0;
  }
  ++machine.epoch;
  machine.block_start = machine.epoch << kEpochShift;
  machine.exited = machine.at_barrier = 0;
  machine.fenced = machine.acquired = false;
  for (int warp = 0; warp < machine.warps; ++warp) {
    const int lanes = machine.threads - warp * kLanes;
    machine.warp[warp] = {};
    machine.warp[warp].lanes = machine.warp[warp].ready = lanes >= kLanes ? ~0u : (1u << lanes) - 1;
  }
  for (int thread = 0; thread < machine.threads; ++thread) {
    Fiber& fiber = machine.fibers[thread];
    fiber.wait = Wait::kNone;
    fiber.first_copy = fiber.copy_count = 0;
    fiber.group = 0;
    // The stacks of a warp's lanes start at different offsets in a page, because stacks at the same offset would share
    // few sets of the CPU's cache.
    prepare(fiber.execution, fiber.stack, kStackBytes - (thread % kLanes) * 128, fiber_main);
  }
  enter(machine, machine.fibers[0]);
  current.active = true;
  switch_execution(machine.host, machine.fibers[0].execution);
  current.active = false;
  current.stack = 0;
}

// Registers a declaration of shared memory for all threads of the launch, at the declaration's first use. Returns
// `begin`.
size_t declare(Machine& machine, const void* key, size_t bytes, const char* name, size_t begin) {
  const int index = machine.declaration_count++;
  machine.declarations[index] = {key, name, begin, bytes};
  for (size_t word = begin / 4; word < (begin + bytes + 3) / 4; ++word) {
    machine.owner[word] = static_cast<uint8_t>(index + 1);
  }
  return begin;
}

void forget_declarations(Machine& machine) {
  for (int i = 0; i < machine.declaration_count; ++i) {
    const Declaration& declaration = machine.declarations[i];
    memset(machine.owner + declaration.begin / 4, 0, (declaration.bytes + 3) / 4);
  }
  machine.declaration_count = 0;
}

void complete(Machine& machine, const PendingCopy& copy) {
  if (copy.take) {
    memcpy(machine.arena + copy.offset, copy.from, copy.bytes);
  } else {
    memset(machine.arena + copy.offset, 0, copy.bytes);
  }
  for (size_t word = copy.offset / 4; word < (copy.offset + copy.bytes) / 4; ++word) {
    machine.words[word] = {current.now, 0};
  }
}

template <typename T>
T add(T* to, T value, const void* site) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) fault(site, "atomic_add to a misaligned address");
  check_access(to, sizeof(T), Access::kAtomic, site);
  Machine& machine = *current.machine;
  if (machine.fenced) {
    if (machine.published == nullptr) {
      machine.published = static_cast<uint8_t*>(calloc(machine.grid[0] * machine.grid[1] * machine.grid[2], 1));
    }
    machine.published[machine.block_stamp - machine.memory->base - kFirstBlock] = 1;
  }
  machine.acquired = true;
  const T before = *to;
  *to = before + value;
  return before;
}

}  // namespace

void fault(const void* site, const char* format, ...) {
  Machine& machine = *current.machine;
  current.active = false;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(machine.fault, sizeof(machine.fault), format, arguments);
  va_end(arguments);
  machine.fault_site = site;
  machine.faulted = true;
  Execution dropped;
  switch_execution(dropped, machine.host);
  __builtin_unreachable();
}

static std::atomic<int64_t> launches{0};  // number of emulated launches in the process

void run(Memory& memory, const void* kernel, void (*invoke)(const void*), const void* call, const int64_t grid[3],
         int threads, int64_t dynamic_shared) {
  ++launches;
  Machine& machine = *this_machine();
  char name[256];
  if (dynamic_shared < 0 || static_cast<size_t>(dynamic_shared) > kMaxShared) {
    describe_function(kernel, name, sizeof(name));
    throw std::runtime_error(std::string("emulator: ") + name + ": " + std::to_string(dynamic_shared) +
                             " bytes of dynamic shared memory, wanted at most " + std::to_string(kMaxShared));
  }
  const int64_t blocks = grid[0] * grid[1] * grid[2];
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;
  if (threads < 1 || threads > kMaxThreads || blocks < 1 || blocks > kMaxBlocks) {
    throw std::runtime_error("emulator: a launch of " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads");
  }
  // Stamps of global memory must be smaller than kAtomicWriter, the bit that marks an atomic write. A launch with the
  // same Memory object begins above all stamps of the launch before.
  if (memory.base + blocks + kFirstBlock >= kAtomicWriter) throw std::runtime_error("emulator: too many blocks");
  machine.memory = &memory;
  machine.invoke = invoke;
  machine.call = call;
  for (int d = 0; d < 3; ++d) machine.grid[d] = grid[d];
  machine.threads = threads;
  machine.warps = (threads + kLanes - 1) / kLanes;
  machine.last_range = nullptr;
  machine.faulted = false;
  machine.static_bytes = 0;
  machine.static_end = kSharedGap;  // without dynamic shared memory, an access to dynamic_shared() is a fault
  if (dynamic_shared > 0) {
    declare(machine, nullptr, static_cast<size_t>(dynamic_shared), "dynamic_shared()", 0);
    machine.static_end = (static_cast<size_t>(dynamic_shared) + 2 * kSharedGap - 1) / kSharedGap * kSharedGap;
  }

  const Current before = current;
  current = {};
  current.machine = &machine;
  current.arena = reinterpret_cast<uintptr_t>(machine.arena);
  for (int64_t block = 0; block < blocks && !machine.faulted; ++block) {
    machine.block[0] = block % grid[0];
    machine.block[1] = block / grid[0] % grid[1];
    machine.block[2] = block / grid[0] / grid[1];
    machine.block_stamp = memory.base + kFirstBlock + static_cast<uint32_t>(block);
    start_block(machine);
  }
  const int thread = current.fiber != nullptr ? current.fiber->thread : 0;
  current = before;
  forget_declarations(machine);
  free(machine.published);
  machine.published = nullptr;
  memory.base += static_cast<uint32_t>(blocks) + kFirstBlock;

  if (machine.faulted) {
    char where[256];
    describe_function(kernel, name, sizeof(name));
    describe_site(machine.fault_site, where, sizeof(where));
    char message[2048];
    snprintf(message, sizeof(message), "emulator: %s, block (%lld, %lld, %lld), thread %d%s%s: %s", name,
             static_cast<long long>(machine.block[0]), static_cast<long long>(machine.block[1]),
             static_cast<long long>(machine.block[2]), thread, where[0] ? ", " : "", where, machine.fault);
    throw std::runtime_error(message);
  }
}

// ---- functions that cuda/ptx.cuh calls

dim3 thread_index() { return dim3(current.fiber->thread, 0, 0); }
dim3 block_index() {
  const int64_t* block = current.machine->block;
  return dim3(static_cast<unsigned>(block[0]), static_cast<unsigned>(block[1]), static_cast<unsigned>(block[2]));
}
dim3 block_size() { return dim3(current.machine->threads, 1, 1); }
dim3 grid_size() {
  const int64_t* grid = current.machine->grid;
  return dim3(static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]), static_cast<unsigned>(grid[2]));
}

void* static_shared(const void* key, size_t bytes, const char* name) {
  Machine& machine = *current.machine;
  for (int i = 0; i < machine.declaration_count; ++i) {
    if (machine.declarations[i].key == key) return machine.arena + machine.declarations[i].begin;
  }
  if (machine.declaration_count > kMaxDeclarations) fault(SITE, "more than %d declarations", kMaxDeclarations);
  const size_t begin = machine.static_end;
  const size_t dynamic =
      machine.declaration_count > 0 && machine.declarations[0].key == nullptr ? machine.declarations[0].bytes : 0;
  machine.static_bytes += (bytes + 15) / 16 * 16;
  if (machine.static_bytes > kMaxStaticShared || machine.static_bytes + dynamic > kMaxShared) {
    fault(SITE,
          "with `%s` a block has %zu bytes of static and %zu of dynamic shared memory, wanted at most %zu and %zu "
          "together",
          name, machine.static_bytes, dynamic, kMaxStaticShared, kMaxShared);
  }
  machine.static_end = (begin + bytes + 2 * kSharedGap - 1) / kSharedGap * kSharedGap;
  return machine.arena + declare(machine, key, bytes, name, begin);
}

void* dynamic_shared() { return current.machine->arena; }

void sync_threads() {
  Machine& machine = *current.machine;
  Fiber& fiber = *current.fiber;
  machine.warp[fiber.thread / kLanes].ready &= ~(1u << (fiber.thread % kLanes));
  ++machine.at_barrier;
  fiber.wait = Wait::kThreads;
  fiber.site = SITE;
  wait(machine, fiber);
}

void sync_warp() { arrive(Wait::kWarp, SITE); }

uint32_t shuffle(uint32_t value, int source, int width) {
  Fiber& fiber = *current.fiber;
  if (width < 1 || width > kLanes || (width & (width - 1)) != 0) fault(SITE, "shuffle of width %d", width);
  const int lane = fiber.thread % kLanes;
  fiber.value = value;
  fiber.argument = (lane & ~(width - 1)) | (source & (width - 1));
  arrive(Wait::kShuffle, SITE);
  return fiber.value;
}

uint32_t shuffle_xor(uint32_t value, int lane_mask) {
  Fiber& fiber = *current.fiber;
  if (lane_mask < 0 || lane_mask >= kLanes) fault(SITE, "shuffle_xor with lane mask %d", lane_mask);
  fiber.value = value;
  fiber.argument = (fiber.thread % kLanes) ^ lane_mask;
  arrive(Wait::kShuffleXor, SITE);
  return fiber.value;
}

uint32_t ballot(bool vote) {
  Fiber& fiber = *current.fiber;
  fiber.value = vote;
  arrive(Wait::kBallot, SITE);
  return fiber.value;
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  Fiber& fiber = *current.fiber;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fault(SITE, "ldmatrix from a row that is not aligned to 16 bytes");
  if (reinterpret_cast<uintptr_t>(row) - current.arena >= kArenaBytes) fault(SITE, "ldmatrix not from shared memory");
  check_access(row, 16, Access::kRead, SITE);
  fiber.row = row;
  fiber.matrices = r;
  arrive(transposed ? Wait::kLdmatrixTrans : Wait::kLdmatrix, SITE);
}

void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fiber& fiber = *current.fiber;
  fiber.c = c;
  fiber.a = a;
  fiber.b = b;
  arrive(Wait::kMmaBf16, SITE);
}

void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fiber& fiber = *current.fiber;
  fiber.c = c;
  fiber.a = a;
  fiber.b = b;
  arrive(Wait::kMmaF16, SITE);
}

void cp_async(void* shared, const void* global, int bytes, bool take) {
  Machine& machine = *current.machine;
  Fiber& fiber = *current.fiber;
  const uintptr_t size = static_cast<uintptr_t>(bytes);
  const size_t offset = reinterpret_cast<uintptr_t>(shared) - current.arena;
  if (offset >= kArenaBytes) fault(SITE, "cp_async_%d not to shared memory", bytes);
  if (offset % size != 0 || reinterpret_cast<uintptr_t>(global) % size != 0) {
    fault(SITE, "cp_async_%d with an address that is not aligned to %d bytes", bytes, bytes);
  }
  if (reinterpret_cast<uintptr_t>(global) - current.arena < kArenaBytes) {
    fault(SITE, "cp_async_%d from shared memory", bytes);
  }
  shared_access(offset, size, Access::kWrite, SITE);
  if (take) check_access(global, size, Access::kRead, SITE);
  // The destination of the cp.async is marked as in flight. The bytes are copied at the thread's cp_async_wait, and an
  // access to the destination by any thread before that copy is a fault.
  for (size_t word = offset / 4; word < (offset + size) / 4; ++word) machine.words[word] = {current.now | kInFlight, 0};
  if (fiber.copy_count == fiber.copy_capacity) {
    fiber.copy_capacity = fiber.copy_capacity == 0 ? 16 : 2 * fiber.copy_capacity;
    fiber.copies =
        static_cast<PendingCopy*>(realloc(static_cast<void*>(fiber.copies), fiber.copy_capacity * sizeof(PendingCopy)));
  }
  fiber.copies[fiber.copy_count++] = {offset, global, bytes, take, fiber.group};
}

void cp_async_commit() { ++current.fiber->group; }

void cp_async_wait(int pending) {
  Machine& machine = *current.machine;
  Fiber& fiber = *current.fiber;
  // cp_async_wait completes the copies of all groups with a number below `done`.
  const int64_t done = static_cast<int64_t>(fiber.group) - pending;
  while (fiber.first_copy < fiber.copy_count && fiber.copies[fiber.first_copy].group < done) {
    complete(machine, fiber.copies[fiber.first_copy++]);
  }
  if (fiber.first_copy == fiber.copy_count) fiber.first_copy = fiber.copy_count = 0;
}

float atomic_add(float* to, float value) { return add(to, value, SITE); }
unsigned atomic_add(unsigned* to, unsigned value) { return add(to, value, SITE); }
int atomic_add(int* to, int value) { return add(to, value, SITE); }
void threadfence() { current.machine->fenced = true; }
void trap() { fault(SITE, "trap"); }

}  // namespace emulator
}  // namespace peft_ext

// Returns the number of emulated launches since the library was loaded, for tests.
extern "C" __attribute__((visibility("default"))) int64_t peft_ext_emulated_launches() {
  return peft_ext::emulator::launches;
}
