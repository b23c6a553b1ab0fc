// Records the parallel loops of peft_ext's operators, for tools/many_cores.py. This library is preloaded (LD_PRELOAD):
// its functions torch_parallel_for and GOMP_parallel replace the functions of these names in torch and libgomp, and
// call the replaced functions, so that torch itself divides each loop among torch's threads. Only one part of a loop
// runs at a time, so that the CPU time of a part does not depend on the number of cores.
//
// peft_ext's CPU library may also be compiled with g++ -fsanitize=thread. The compiled code then calls __tsan_read and
// __tsan_write for each access to memory that is not certainly a local variable. Each thread has a model of an L1 and
// an L2 cache, and `group` threads share an L3 cache:
//
//   lines from L2    cache lines that were not in the thread's L1. Every loop starts with an empty L1
//   lines from L3    cache lines that were not in the thread's L2, or that another thread wrote since
//   lines from DRAM  cache lines that the threads of one L3 use for the first time in this loop
//
// Gathers, masked accesses and accesses of torch itself are not recorded.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kLineShift = 6, kPageShift = 12, kHugeShift = 21;
constexpr int kLinesOfPage = 1 << (kPageShift - kLineShift);
constexpr int kWays = 8, kL1Sets = 64;  // an L1 of 32 KiB

using ParallelFunc = void (*)(int64_t begin, int64_t end, void* context);

struct Counts {
  int64_t accesses = 0, from_l2 = 0, from_l3 = 0, from_dram = 0, taken = 0;  // taken: lines that another thread wrote
};

struct Line {
  uint32_t groups = 0;               // L3 caches whose threads used the line in the loop `used`
  uint16_t used = 0, written = 0;    // numbers of the last loops that used and wrote the line
  uint16_t writer = 0;               // the last thread that wrote the line
  uint8_t readers = 0, writers = 0;  // sockets, as bits, since the start of the record
  bool shared = false;               // whether two threads wrote the line in the loop `written`
};
struct Page {
  Line lines[kLinesOfPage];
};

// What a cache notes about one of its lines.
struct Entry {
  uint16_t loop = 0;     // the loop that loaded the line
  bool written = false;  // in an L1: whether the thread of this L1 wrote the line in this loop
};

// A set-associative cache that replaces the least recently used way of a set.
struct Cache {
  struct Set {
    uint64_t lines[kWays];
    uint64_t used[kWays];  // the cache's clock at the last use
    Entry entries[kWays];
  };
  std::vector<Set> sets;
  uint64_t clock = 0;

  void clear(uint64_t count) {
    Set empty{};
    std::fill_n(empty.lines, kWays, ~uint64_t{0});
    sets.assign(count, empty);
  }

  // Returns the entry of the line. `found` tells whether the cache had the line.
  Entry& use(uint64_t line, bool* found) {
    Set& set = sets[line & (sets.size() - 1)];
    int way = -1;
    for (int i = 0; i < kWays; ++i) way = set.lines[i] == line ? i : way;
    *found = way >= 0;
    if (way < 0) {
      way = static_cast<int>(std::min_element(set.used, set.used + kWays) - set.used);
      set.lines[way] = line;
      set.entries[way] = Entry();
    }
    set.used[way] = ++clock;
    return set.entries[way];
  }
};

struct Thread {
  int index = 0;
  uint64_t last = ~uint64_t{0};
  bool last_written = false;
  uint16_t loop = 0;
  Cache l1, l2;
  Counts counts;
};

struct Part {
  int thread;
  int64_t from, to, nanoseconds;
  Counts counts;
};
struct Loop {
  ParallelFunc function;
  int64_t begin, end, shared;
  std::vector<Part> parts;
};

// The state of the record. A thread holds `guard` while it runs a part of a loop. Outside of loops, only the thread
// that calls the operators changes the state.
struct Recorder {
  bool on = false, traces = false;
  int threads = 1, group = 8;
  uint16_t loop = 0;
  int64_t shared = 0, teams = 0, serial_nanoseconds = 0, since = 0;
  std::vector<Loop> loops;
  std::vector<std::unique_ptr<Thread>> caches;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
  uint64_t last_number = 0;  // the page that line_of found last
  Page* last_page = nullptr;
  std::mutex guard;
};
Recorder recorder;

thread_local bool within = false;       // whether the thread runs a part of a recorded loop
thread_local Thread* traced = nullptr;  // the model's thread whose caches this thread's accesses go to, or null

int64_t cpu_time() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{1000000000} * now.tv_sec + now.tv_nsec;
}

Line& line_of(uint64_t line) {
  const uint64_t number = line / kLinesOfPage;
  if (number != recorder.last_number || recorder.last_page == nullptr) {
    std::unique_ptr<Page>& found = recorder.pages[number];
    if (found == nullptr) found = std::make_unique<Page>();
    recorder.last_page = found.get();
    recorder.last_number = number;
  }
  return recorder.last_page->lines[line % kLinesOfPage];
}

void note_write(Thread& thread, Line& line) {
  if (line.written != recorder.loop) line.shared = false;
  if (line.written == recorder.loop && line.writer != thread.index) {
    ++thread.counts.taken;
    if (!line.shared) ++recorder.shared;
    line.shared = true;
  }
  line.written = recorder.loop;
  line.writer = static_cast<uint16_t>(thread.index);
  line.writers |= static_cast<uint8_t>(1 << (2 * thread.index >= recorder.threads));
}

void note_line(Thread& thread, uint64_t number, bool writes) {
  if (number == thread.last && (!writes || thread.last_written)) return;
  bool in_l1 = false;
  Entry& entry = thread.l1.use(number, &in_l1);
  if (!in_l1) {
    Line& line = line_of(number);
    thread.counts.from_l2 += 1;
    bool in_l2 = false;
    Entry& second = thread.l2.use(number, &in_l2);
    if (!in_l2 || (line.written >= second.loop && line.writer != thread.index && line.writers != 0)) {
      thread.counts.from_l3 += 1;
      second.loop = recorder.loop;
      if (line.used != recorder.loop) line.groups = 0;
      line.used = recorder.loop;
      const uint32_t group = uint32_t{1} << (thread.index / recorder.group % 32);
      if ((line.groups & group) == 0) thread.counts.from_dram += 1;
      line.groups |= group;
    }
    line.readers |= static_cast<uint8_t>(1 << (2 * thread.index >= recorder.threads));
  }
  if (writes && !entry.written) {
    note_write(thread, line_of(number));
    entry.written = true;
  }
  thread.last = number;
  thread.last_written = entry.written;
}

void note_access(const void* at, uint64_t bytes, bool writes) {
  Thread* thread = traced;
  if (thread == nullptr || bytes == 0) return;
  ++thread->counts.accesses;
  const uint64_t first = reinterpret_cast<uint64_t>(at) >> kLineShift;
  const uint64_t last = (reinterpret_cast<uint64_t>(at) + bytes - 1) >> kLineShift;
  for (uint64_t line = first; line <= last; ++line) note_line(*thread, line, writes);
}

// Directs the accesses of the calling thread to the caches of torch's thread `index`.
void trace_as(int index) {
  if (!recorder.traces) return;
  Thread& thread = *recorder.caches[static_cast<size_t>(index)];
  if (thread.loop != recorder.loop) thread.l1.clear(kL1Sets);
  thread.loop = recorder.loop;
  thread.last = ~uint64_t{0};
  thread.counts = Counts();
  traced = &thread;
}

template <typename Function>
Function function_of(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<Function>(dlsym(handle != nullptr ? handle : RTLD_NEXT, name));
}

struct Call {
  ParallelFunc function;
  void* context;
  int64_t begin, end;
  Loop* loop;
};

void run_part(int64_t from, int64_t to, void* context) {
  static const auto thread_index = function_of<int32_t (*)(uint32_t*)>("libtorch_cpu.so", "torch_get_thread_idx");
  const Call& call = *static_cast<const Call*>(context);
  if (from == call.begin && to == call.end) {  // torch runs a loop that is too short for two threads without a team
    recorder.since = cpu_time();
    call.function(from, to, call.context);
    recorder.serial_nanoseconds += cpu_time() - recorder.since;
    return;
  }
  uint32_t index = 0;
  thread_index(&index);
  const std::lock_guard<std::mutex> lock(recorder.guard);
  within = true;
  trace_as(static_cast<int>(index));
  const int64_t start = cpu_time();
  call.function(from, to, call.context);
  const int64_t nanoseconds = cpu_time() - start;
  call.loop->parts.push_back({static_cast<int>(index), from, to, nanoseconds, traced ? traced->counts : Counts()});
  traced = nullptr;
  within = false;
}

}  // namespace

EXPORTED int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc function, void* context) {
  using Real = int32_t (*)(int64_t, int64_t, int64_t, ParallelFunc, void*);
  static const auto real = function_of<Real>("libtorch_cpu.so", "torch_parallel_for");
  if (!recorder.on || within || begin >= end) return real(begin, end, grain, function, context);
  recorder.serial_nanoseconds += cpu_time() - recorder.since;
  Thread* const outside = traced;
  const Counts before = outside != nullptr ? outside->counts : Counts();
  ++recorder.loop;
  recorder.shared = 0;
  Loop loop{function, begin, end, 0, {}};
  Call call{function, context, begin, end, &loop};
  const int32_t result = real(begin, end, grain, run_part, &call);
  ++recorder.loop;
  if (!loop.parts.empty()) {
    loop.shared = recorder.shared;
    recorder.loops.push_back(std::move(loop));
    if (outside != nullptr) {
      trace_as(0);
      outside->counts = before;
    }
  }
  recorder.since = cpu_time();
  return result;
}

EXPORTED void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags) {
  using Real = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto real = function_of<Real>("libgomp.so.1", "GOMP_parallel");
  if (recorder.on && !within) ++recorder.teams;
  real(function, data, threads, flags);
}

// Starts a record of the calling thread's operators. threads: torch's number of threads. group: number of threads that
// share an L3 cache. l2_bytes: bytes of an L2 cache. traces: whether peft_ext's library is compiled with
// -fsanitize=thread.
EXPORTED void record_start(int threads, int group, int64_t l2_bytes, int traces) {
  recorder.threads = threads;
  recorder.group = group;
  recorder.traces = traces != 0;
  recorder.loop = 1;
  recorder.teams = recorder.serial_nanoseconds = 0;
  recorder.loops.clear();
  recorder.pages.clear();
  recorder.last_page = nullptr;
  recorder.caches.clear();
  for (int index = 0; recorder.traces && index < threads; ++index) {
    recorder.caches.push_back(std::make_unique<Thread>());
    recorder.caches.back()->index = index;
    recorder.caches.back()->l2.clear(static_cast<uint64_t>(l2_bytes >> kLineShift) / kWays);
  }
  trace_as(0);
  recorder.on = true;
  recorder.since = cpu_time();
}

// Ends the record and writes it to the file `path`, as JSON.
EXPORTED void record_stop(const char* path) {
  recorder.serial_nanoseconds += cpu_time() - recorder.since;
  recorder.on = false;
  const Counts outside = traced != nullptr ? traced->counts : Counts();
  traced = nullptr;
  FILE* file = fopen(path, "w");
  if (file == nullptr) return;
  const auto write_counts = [&](const Counts& counts) {
    for (const int64_t count : {counts.accesses, counts.from_l2, counts.from_l3, counts.from_dram, counts.taken})
      fprintf(file, ", %lld", static_cast<long long>(count));
  };
  // For each page, the sockets that used the page (the first number) and the sockets that wrote it (the second), one
  // bit for each socket.
  std::unordered_map<uint64_t, std::pair<int, int>> small, huge;
  for (const auto& [number, page] : recorder.pages)
    for (const Line& line : page->lines)
      for (auto* sockets : {&small[number], &huge[number >> (kHugeShift - kPageShift)]}) {
        sockets->first |= line.readers | line.writers;
        sockets->second |= line.writers;
      }
  fprintf(file, "{\"teams\": %lld, \"serial\": [%lld", static_cast<long long>(recorder.teams),
          static_cast<long long>(recorder.serial_nanoseconds));
  write_counts(outside);
  fprintf(file, "]");
  for (const auto& [name, pages] : {std::make_pair("pages", &small), std::make_pair("huge_pages", &huge)}) {
    int64_t used = 0, written = 0;
    for (const auto& entry : *pages) used += entry.second.first == 3, written += entry.second.second == 3;
    fprintf(file, ", \"%s\": [%lld, %lld]", name, static_cast<long long>(used), static_cast<long long>(written));
  }
  fprintf(file, ", \"loops\": [");
  for (size_t i = 0; i < recorder.loops.size(); ++i) {
    Loop& loop = recorder.loops[i];
    std::sort(loop.parts.begin(), loop.parts.end(), [](const Part& a, const Part& b) { return a.from < b.from; });
    Dl_info library{};
    dladdr(reinterpret_cast<void*>(loop.function), &library);
    fprintf(file, "%s\n{\"function\": %lld, \"shared\": %lld, \"parts\": [", i > 0 ? "," : "",
            static_cast<long long>(reinterpret_cast<char*>(loop.function) - static_cast<char*>(library.dli_fbase)),
            static_cast<long long>(loop.shared));
    for (const Part& part : loop.parts) {
      fprintf(file, "%s[%d, %lld, %lld, %lld", &part == loop.parts.data() ? "" : ", ", part.thread,
              static_cast<long long>(part.from), static_cast<long long>(part.to),
              static_cast<long long>(part.nanoseconds));
      write_counts(part.counts);
      fprintf(file, "]");
    }
    fprintf(file, "]}");
  }
  fprintf(file, "]}\n");
  fclose(file);
}

// Returns the mean seconds of an empty loop on torch's threads, over `repeats` loops.
EXPORTED double empty_loop_seconds(int threads, int repeats) {
  const auto nothing = [](int64_t, int64_t, void*) {};
  timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int i = 0; i < repeats; ++i) torch_parallel_for(0, threads, 1, nothing, nullptr);
  clock_gettime(CLOCK_MONOTONIC, &end);
  return (static_cast<double>(end.tv_sec - start.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - start.tv_nsec)) /
         repeats;
}

#define ACCESSES(bytes)                                                                   \
  EXPORTED void __tsan_read##bytes(void* at) { note_access(at, bytes, false); }           \
  EXPORTED void __tsan_write##bytes(void* at) { note_access(at, bytes, true); }           \
  EXPORTED void __tsan_unaligned_read##bytes(void* at) { note_access(at, bytes, false); } \
  EXPORTED void __tsan_unaligned_write##bytes(void* at) { note_access(at, bytes, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
EXPORTED void __tsan_read_range(void* at, unsigned long bytes) { note_access(at, bytes, false); }
EXPORTED void __tsan_write_range(void* at, unsigned long bytes) { note_access(at, bytes, true); }
EXPORTED void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  note_access(from, bytes, false);
  note_access(to, bytes, true);
  return memcpy(to, from, bytes);
}
EXPORTED void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  note_access(from, bytes, false);
  note_access(to, bytes, true);
  return memmove(to, from, bytes);
}
EXPORTED void* __wrap_memset(void* to, int value, size_t bytes) {
  note_access(to, bytes, true);
  return memset(to, value, bytes);
}

// The functions that compiled code calls for operations of std::atomic and of vptrs. Their accesses are not counted,
// because the kernels have few of them.
EXPORTED void __tsan_init() {}
EXPORTED void __tsan_vptr_update(void**, void*) {}
EXPORTED void __tsan_vptr_read(void**) {}
#define ATOMICS(bits, T)                                                                                            \
  EXPORTED T __tsan_atomic##bits##_load(const T* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }         \
  EXPORTED void __tsan_atomic##bits##_store(T* at, T value, int) { __atomic_store_n(at, value, __ATOMIC_SEQ_CST); } \
  EXPORTED T __tsan_atomic##bits##_exchange(T* at, T value, int) {                                                  \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                                 \
  EXPORTED T __tsan_atomic##bits##_fetch_add(T* at, T value, int) {                                                 \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                                 \
  EXPORTED T __tsan_atomic##bits##_fetch_sub(T* at, T value, int) {                                                 \
    return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                                 \
  EXPORTED int __tsan_atomic##bits##_compare_exchange_strong(T* at, T* expected, T value, int, int) {               \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);             \
  }                                                                                                                 \
  EXPORTED int __tsan_atomic##bits##_compare_exchange_weak(T* at, T* expected, T value, int, int) {                 \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);             \
  }
ATOMICS(8, uint8_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
EXPORTED void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
EXPORTED void __tsan_atomic_signal_fence(int) {}
