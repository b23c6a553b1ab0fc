// Kernels for tests/native/test_emulator.py. Most kernels have two versions: a correct version, and a version (kBroken)
// with a planted fault. Each kernel takes `in` (read only) and `out`, of 256 words each, and runs in two blocks of 64
// threads unless the test gives other numbers.
#include <stdio.h>
#include <string.h>

#include <stdexcept>

#include "cuda/ptx.cuh"
#include "emulator/launch.h"

namespace peft_ext {
namespace {

// Returns whether this thread has the planted fault, for a fault in a single thread.
__device__ __forceinline__ bool here() { return blockIdx.x == 1 && threadIdx.x == 37; }
__device__ __forceinline__ int index() { return blockIdx.x * blockDim.x + threadIdx.x; }

__device__ const uint32_t kTable[4] = {3, 1, 4, 1};

// ---- faults

template <bool kBroken>
__global__ void read_past_end(const uint32_t* in, uint32_t* out) {
  out[index()] = in[kBroken && here() ? 256 : index()];
}

template <bool kBroken>
__global__ void write_before_begin(const uint32_t* in, uint32_t* out) {
  out[kBroken && here() ? -1 : index()] = in[index()];
}

template <bool kBroken>
__global__ void write_input(const uint32_t* in, uint32_t* out) {
  uint32_t* to = kBroken && here() ? const_cast<uint32_t*>(in) : out;
  to[index()] = 1;
}

template <bool kBroken>
__global__ void null_pointer(const uint32_t* in, uint32_t* out) {
  const uint32_t* from = kBroken && here() ? nullptr : in;
  out[index()] = from[0];
}

template <bool kBroken>
__global__ void trapped(const uint32_t* in, uint32_t* out) {
  if (kBroken && here()) trap();
  out[index()] = in[index()];
}

template <bool kBroken>
__global__ void misaligned_load(const uint32_t* in, uint32_t* out) {
  const uint4 values = load_streaming(reinterpret_cast<const uint4*>(in + (kBroken && here() ? 2 : 4)));
  out[index()] = values.x + values.w;
}

template <bool kBroken>
__global__ void misaligned_copy(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64 * 4 + 4], tile);
  cp_async_16(&tile[4 * threadIdx.x + (kBroken && here() ? 1 : 0)], in, true);
  cp_async_commit();
  cp_async_wait<0>();
  out[index()] = tile[4 * threadIdx.x];
}

template <bool kBroken>
__global__ void static_shared_bounds(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], first);
  PEFT_EXT_SHARED(uint32_t[64], second);
  uint32_t* to = first;
  to[threadIdx.x + (kBroken && here() ? 64 - 37 : 0)] = in[index()];
  second[threadIdx.x] = first[threadIdx.x];
  out[index()] = second[threadIdx.x];
}

template <bool kBroken>
__global__ void dynamic_shared_bounds(const uint32_t* in, uint32_t* out) {
  uint32_t* tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  tile[threadIdx.x + (kBroken && here() ? 64 - 37 : 0)] = in[index()];
  out[index()] = tile[threadIdx.x];
}

struct Rows {
  uint32_t row[2][4];
  uint32_t next[8];
};

template <bool kBroken>
__global__ void member_bounds(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(Rows, rows);
  if (threadIdx.x == 37) {
    const int column = kBroken && here() ? 4 + in[0] : 3;  // element 4 is beyond the array, and still within the struct
    rows.row[1][column] = 1;
    out[index()] = rows.row[1][column];
  }
}

template <bool kBroken>
__global__ void local_bounds(const uint32_t* in, uint32_t* out) {
  uint32_t values[8];
  for (int i = 0; i < 8; ++i) values[i] = in[i];
  out[index()] = values[kBroken && here() ? in[8] : in[7]];
}

template <bool kBroken>
__global__ void never_written(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint16_t[128], tile);
  tile[2 * threadIdx.x] = static_cast<uint16_t>(in[index()]);
  out[index()] = tile[2 * threadIdx.x + (kBroken && here() ? 1 : 0)];
}

// A value in shared memory that another block wrote counts as unwritten.
template <bool kBroken>
__global__ void never_written_by_this_block(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  if (!(kBroken && here())) tile[threadIdx.x] = in[index()];
  out[index()] = tile[threadIdx.x];
}

template <bool kBroken>
__global__ void in_flight(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  cp_async_4(&tile[threadIdx.x], in + index(), true);
  cp_async_commit();
  if (!(kBroken && here())) cp_async_wait<0>();
  out[index()] = tile[threadIdx.x];
}

// Two groups of copies are in flight, and the kernel reads the older one.
template <bool kBroken>
__global__ void wrong_group(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[2][64], tile);
  cp_async_4(&tile[0][threadIdx.x], in + index(), true);
  cp_async_commit();
  cp_async_4(&tile[1][threadIdx.x], in + index(), true);
  cp_async_commit();
  cp_async_wait<1>();
  out[index()] = tile[kBroken && here() ? 1 : 0][threadIdx.x];
}

template <bool kBroken>
__global__ void not_committed(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  cp_async_4(&tile[threadIdx.x], in + index(), true);
  if (!(kBroken && here())) cp_async_commit();
  cp_async_wait<0>();
  out[index()] = tile[threadIdx.x];
}

// cp.async.wait makes only the copies of the calling thread visible to the thread, not the copies of other threads.
template <bool kBroken>
__global__ void copy_of_another_thread(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  cp_async_4(&tile[threadIdx.x], in + index(), true);
  cp_async_commit();
  cp_async_wait<0>();
  if (!kBroken) sync_threads();
  out[index()] = tile[threadIdx.x & ~1u];
}

template <bool kBroken>
__global__ void copy_over_what_others_read(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  tile[threadIdx.x] = in[index()];
  sync_threads();
  out[index()] = tile[(threadIdx.x + 1) % 64];
  if (!kBroken) sync_threads();
  cp_async_4(&tile[threadIdx.x], in + index(), true);
  cp_async_commit();
  cp_async_wait<0>();
}

template <bool kBroken>
__global__ void barrier_after_exit(const uint32_t* in, uint32_t* out) {
  if (kBroken && here()) return;
  sync_threads();
  out[index()] = in[index()];
}

template <bool kBroken>
__global__ void collective_after_exit(const uint32_t* in, uint32_t* out) {
  if (kBroken && here()) return;
  out[index()] = shuffle_xor(in[index()], 1);
}

template <bool kBroken>
__global__ void collective_in_branch(const uint32_t* in, uint32_t* out) {
  uint32_t value = in[index()];
  if (!kBroken || threadIdx.x % kWarpSize < 16) value = shuffle(value, 0);
  sync_threads();
  out[index()] = value;
}

template <bool kBroken>
__global__ void different_collectives(const uint32_t* in, uint32_t* out) {
  uint32_t value = in[index()];
  if (kBroken && here()) {
    value = ballot(value != 0);
  } else {
    value = shuffle(value, 0);
  }
  out[index()] = value;
}

template <bool kBroken>
__global__ void read_without_barrier(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  tile[threadIdx.x] = in[index()];
  if (!kBroken) sync_threads();
  out[index()] = tile[threadIdx.x / 2];
}

// The emulator runs the threads in order, so that only the recorded reads show this fault.
template <bool kBroken>
__global__ void write_without_barrier(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  tile[threadIdx.x] = in[index()];
  sync_threads();
  out[index()] = tile[(threadIdx.x + 1) % 64];
  if (!kBroken) sync_threads();
  tile[threadIdx.x] = 0;
}

template <bool kBroken>
__global__ void two_writers(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t, total);
  if (threadIdx.x == 0 || (kBroken && here())) total = in[0];
  sync_threads();
  out[index()] = total;
}

template <bool kBroken>
__global__ void neighbour_bytes(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint8_t[64], tile);
  tile[threadIdx.x ^ (kBroken && here() ? 1 : 0)] = static_cast<uint8_t>(in[index()]);
  sync_threads();
  if (threadIdx.x % 4 == 0) out[index()] = *reinterpret_cast<uint32_t*>(tile + threadIdx.x);
}

template <bool kBroken>
__global__ void warp_without_barrier(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  tile[threadIdx.x] = in[index()];
  if (!kBroken) sync_warp();
  out[index()] = tile[threadIdx.x & ~1u];
}

template <bool kBroken>
__global__ void warp_barrier_for_two_warps(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  tile[threadIdx.x] = in[index()];
  if (kBroken) {
    sync_warp();
  } else {
    sync_threads();
  }
  out[index()] = tile[threadIdx.x % 32];
}

template <bool kBroken>
__global__ void shuffle_is_no_barrier(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  tile[threadIdx.x] = in[index()];
  const uint32_t other = shuffle_xor(in[index()], 1);
  if (!kBroken) sync_warp();
  out[index()] = tile[threadIdx.x & ~1u] + other;
}

template <bool kBroken>
__global__ void blocks_write_the_same(const uint32_t* in, uint32_t* out) {
  out[kBroken ? threadIdx.x : index()] = in[index()];
}

template <bool kBroken>
__global__ void block_reads_another_s(const uint32_t* in, uint32_t* out) {
  out[index()] = in[index()];
  if (kBroken && here()) out[index()] = out[0];
}

template <bool kBroken>
__global__ void block_writes_what_another_read(const uint32_t* in, uint32_t* out) {
  const uint32_t value = kBroken && blockIdx.x == 0 ? out[100] : 0;
  if (index() == 100) out[100] = in[0] + value;
}

// The last block that increments the counter out[200] adds the values that all blocks wrote.
template <bool kBroken>
__global__ void last_block_sums(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t, arrived);
  out[index()] = in[index()];
  if (!kBroken) threadfence();
  sync_threads();
  if (threadIdx.x == 0) arrived = atomic_add(&out[200], 1u);
  sync_threads();
  if (arrived == gridDim.x - 1 && threadIdx.x == 0) {
    uint32_t sum = 0;
    for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += out[i];
    out[201] = sum;
  }
}

template <bool kBroken>
__global__ void scratch_never_written(const uint32_t* in, uint32_t* out) {
  if (!(kBroken && here())) out[index()] = in[index()];
  out[index()] = out[index()] + 1;
}

template <bool kBroken>
__global__ void too_much_shared(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[12 * 1024 - 4], tile);
  PEFT_EXT_SHARED(uint32_t[kBroken ? 5 : 4], more);
  tile[threadIdx.x] = in[index()];
  if (threadIdx.x == 0) more[0] = 0;
  out[index()] = tile[threadIdx.x];
}

template <bool kBroken>
__global__ void copied_struct(const uint32_t* in, uint32_t* out) {
  struct Sixty {
    uint32_t values[15];
  };
  const Sixty copy = *reinterpret_cast<const Sixty*>(in + (kBroken && here() ? 250 : 0));
  memcpy(out + (threadIdx.x == 37 ? 20 * blockIdx.x : 200), &copy, threadIdx.x == 37 ? sizeof(copy) : 0);
}

// ---- what the instructions do

__global__ void shuffles(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  const uint32_t value = in[lane];
  out[lane] = shuffle(value, lane + 5) ^ shuffle(value, lane * 3, 8);
  out[32 + lane] = shuffle_xor(value, 16);
  out[64 + lane] = float_to_bits(shuffle(bits_to_float(value), 31 - lane));
  out[96 + lane] = static_cast<uint32_t>(shuffle(static_cast<int>(value), 2, 4));
  out[128 + lane] = ballot(value % 3 == 0);
  out[160 + lane] = any_lane(lane == 7) * 2 + any_lane(false);
  out[192 + lane] = float_to_bits(shuffle_xor(bits_to_float(value), 1));
  uint32_t low, high;
  mul_wide(value, 0x9e3779b9u, low, high);
  out[224 + lane] = high ^ low ^ spread_signs(value) ^ spread_sign<false>(value) ^ (spread_sign<true>(value) >> 1);
}

__global__ void atomics(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(unsigned, count);
  PEFT_EXT_SHARED(float, sum);
  if (threadIdx.x == 0) {
    count = 0;
    sum = 0.0f;
  }
  sync_threads();
  atomic_add(&count, 1u);
  atomic_add(&sum, 0.5f);
  sync_threads();
  if (threadIdx.x == 0) {
    atomic_add(&out[0], count);
    atomic_add(reinterpret_cast<float*>(out) + 1, sum);
  }
  atomic_add(reinterpret_cast<int*>(out) + 2, -static_cast<int>(in[index()]));
}

// Sums the words of the block by halves, with a barrier after each step.
__global__ void reduction(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  tile[threadIdx.x] = in[index()] + kTable[threadIdx.x % 4];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    sync_threads();
    if (threadIdx.x < half) tile[threadIdx.x] += tile[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = tile[0];
}

// A pipeline of two stages over four steps of 64 words. A copy with take = false writes zeros.
__global__ void pipeline(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[2][64], tile);
  const bool copies = threadIdx.x < 16;
  if (copies) cp_async_16(&tile[0][4 * threadIdx.x], in + 4 * threadIdx.x, true);
  cp_async_commit();
  uint32_t sum = 0;
  for (int step = 0; step < 4; ++step) {
    if (step < 3 && copies) {
      cp_async_16(&tile[(step + 1) % 2][4 * threadIdx.x], in + 64 * (step + 1) + 4 * threadIdx.x, threadIdx.x % 2 == 0);
    }
    cp_async_commit();
    cp_async_wait<1>();
    sync_threads();
    sum += tile[step % 2][threadIdx.x ^ 33] << step;
    sync_threads();
  }
  PEFT_EXT_SHARED(uint32_t[128], pairs);
  cp_async_8(&pairs[2 * threadIdx.x], in + 2 * threadIdx.x, threadIdx.x < 32);
  cp_async_commit();
  cp_async_wait<0>();
  out[index()] = sum;
  out[64 + index()] = pairs[2 * threadIdx.x] - pairs[2 * threadIdx.x + 1];
}

template <bool kTransposed>
__global__ void ldmatrix(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[32][4], rows);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) rows[lane][i] = in[4 * lane + i];
  sync_warp();
  uint32_t r[4];
  if (kTransposed) {
    ldmatrix_x4_trans(r, shared_at(rows[lane]));
  } else {
    ldmatrix_x4(r, shared_at(rows[lane]));
  }
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

template <typename T>
__global__ void mma(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = in[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = in[128 + 2 * lane + i];
  for (int i = 0; i < 4; ++i) c[i] = bits_to_float(out[4 * lane + i]);
  mma_m16n8k16<T>(c, a, b);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = float_to_bits(c[i]);
}

template <typename T>
__global__ void pairs(const uint32_t* in, uint32_t* out) {
  const float2 values = unpack2<T>(in[index()]);
  out[index()] = pack2<T>(values.x, values.y);
  out[128 + index()] = float_to_bits(fma_rn(values.x, values.y, fadd_rn(values.x, fmul_rn(values.y, 3.0f))));
}

__global__ void coordinates(const uint32_t*, uint32_t* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (threadIdx.x == 0) out[block] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * blockDim.x;
}

// ---- loads to measure time: in[0] rounds, which the compiler cannot remove

__global__ void many_global_reads(const uint32_t* in, uint32_t* out) {
  const uint32_t rounds = in[0];
  uint32_t sum = 0;
  for (uint32_t i = 0; i < rounds; ++i) sum += *const_cast<const volatile uint32_t*>(in + i % 128);
  out[index()] = sum;
}

__global__ void many_shared_accesses(const uint32_t* in, uint32_t* out) {
  PEFT_EXT_SHARED(uint32_t[64], tile);
  volatile uint32_t& mine = tile[threadIdx.x];
  mine = 0;
  const uint32_t rounds = in[0];
  for (uint32_t i = 0; i < rounds; ++i) mine = mine + 1;
  out[index()] = mine;
}

__global__ void many_products(const uint32_t* in, uint32_t* out) {
  const uint32_t a[4] = {in[1], in[2], in[3], in[4]}, b[2] = {in[5], in[6]};
  float c[4] = {};
  const uint32_t rounds = in[0];
  for (uint32_t i = 0; i < rounds; ++i) mma_m16n8k16<bf16>(c, a, b);
  out[index()] = float_to_bits(c[0] + c[1] + c[2] + c[3]);
}

using Kernel = void (*)(const uint32_t*, uint32_t*);

struct Case {
  const char* name;
  Kernel kernel;
};

#define TWINS(name) \
  {#name, name<false>}, { #name "_broken", name<true> }
const Case kCases[] = {TWINS(read_past_end),
                       TWINS(write_before_begin),
                       TWINS(write_input),
                       TWINS(null_pointer),
                       TWINS(trapped),
                       TWINS(misaligned_load),
                       TWINS(misaligned_copy),
                       TWINS(static_shared_bounds),
                       TWINS(dynamic_shared_bounds),
                       TWINS(member_bounds),
                       TWINS(local_bounds),
                       TWINS(never_written),
                       TWINS(never_written_by_this_block),
                       TWINS(in_flight),
                       TWINS(wrong_group),
                       TWINS(not_committed),
                       TWINS(copy_of_another_thread),
                       TWINS(copy_over_what_others_read),
                       TWINS(barrier_after_exit),
                       TWINS(collective_after_exit),
                       TWINS(collective_in_branch),
                       TWINS(different_collectives),
                       TWINS(read_without_barrier),
                       TWINS(write_without_barrier),
                       TWINS(two_writers),
                       TWINS(neighbour_bytes),
                       TWINS(warp_without_barrier),
                       TWINS(warp_barrier_for_two_warps),
                       TWINS(shuffle_is_no_barrier),
                       TWINS(blocks_write_the_same),
                       TWINS(block_reads_another_s),
                       TWINS(block_writes_what_another_read),
                       TWINS(last_block_sums),
                       TWINS(scratch_never_written),
                       TWINS(too_much_shared),
                       TWINS(copied_struct),
                       {"shuffles", shuffles},
                       {"atomics", atomics},
                       {"reduction", reduction},
                       {"pipeline", pipeline},
                       {"ldmatrix", ldmatrix<false>},
                       {"ldmatrix_trans", ldmatrix<true>},
                       {"mma_bf16", mma<bf16>},
                       {"mma_f16", mma<f16>},
                       {"pairs_bf16", pairs<bf16>},
                       {"pairs_f16", pairs<f16>},
                       {"coordinates", coordinates},
                       {"many_global_reads", many_global_reads},
                       {"many_shared_accesses", many_shared_accesses},
                       {"many_products", many_products}};

}  // namespace
}  // namespace peft_ext

// Launches a kernel on `in` and `out` of 1 KiB each. Returns 0 if the kernel ran; otherwise 1, and the reason in
// `message`.
extern "C" __attribute__((visibility("default"))) int run_kernel(const char* name, const int64_t* grid, int threads,
                                                                 int64_t dynamic_shared, const uint32_t* in,
                                                                 uint32_t* out, int scratch, char* message,
                                                                 size_t message_bytes) {
  using namespace peft_ext;
  try {
    for (const Case& test : kCases) {
      if (strcmp(test.name, name) != 0) continue;
      emulator::Memory memory;
      memory.add(in, 1024, 4, emulator::Use::kRead);
      memory.add(out, 1024, 4, scratch ? emulator::Use::kFresh : emulator::Use::kWrite);
      void* parameters[] = {&in, &out};
      emulator::launch(memory, test.kernel, {grid[0], grid[1], grid[2]}, threads, dynamic_shared, parameters);
      return 0;
    }
    snprintf(message, message_bytes, "no kernel %s", name);
  } catch (const std::runtime_error& error) {
    snprintf(message, message_bytes, "%s", error.what());
  }
  return 1;
}
