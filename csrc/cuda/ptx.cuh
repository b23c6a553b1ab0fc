// This file wraps device instructions that C++ has no expression for. The file does not depend on torch. Most wrappers
// have two bodies: one for NVRTC, and one for the emulator (csrc/emulator, PEFT_EXT_EMULATE_CUDA), which runs the
// kernels on a CPU and checks each memory access. If all 32 lanes of a warp must call a wrapper together, the emulator
// raises an error if some lanes do not.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulator/device.h"
#endif

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"

// PEFT_EXT_KERNEL is the first statement of every kernel. In the host library, PEFT_EXT_KERNEL sets called_kernel
// (kernel_name.h), by which Launcher finds the kernel, and returns: g++ drops the kernel's code behind this statement.
#if defined(__CUDACC__) || defined(PEFT_EXT_EMULATE_CUDA)
#define PEFT_EXT_KERNEL
#else
#include "cuda/kernel_name.h"
// g++ parses the code of kernels, although the host library drops this code; the pragmas switch off two warnings about
// the code of kernels.
#pragma GCC diagnostic ignored "-Wshift-count-negative"
#pragma GCC diagnostic ignored "-Wstrict-aliasing"
#define PEFT_EXT_KERNEL                                   \
  struct Here {                                           \
    static const char* file() { return __FILE__; }        \
  };                                                      \
  ::peft_ext::called_kernel = &::peft_ext::kKernel<Here>; \
  return
#endif

// PEFT_EXT_SHARED(Type, name) declares `Type& name` in this block's shared memory, aligned to 128 bytes and not
// initialized. Type is a trivial type, an array or a struct, without a comma in its name. All declarations of a kernel
// take at most 48 KiB together.
#ifndef __CUDACC__
#define PEFT_EXT_SHARED(Type, name)                                             \
  static const char name##_key = 0;                                             \
  ::peft_ext::Identity<Type>& name = *static_cast<::peft_ext::Identity<Type>*>( \
      ::peft_ext::emulator::static_shared(&name##_key, sizeof(::peft_ext::Identity<Type>), #name))
#else
#define PEFT_EXT_SHARED(Type, name)                                                         \
  __shared__ __align__(128) unsigned char name##_bytes[sizeof(::peft_ext::Identity<Type>)]; \
  ::peft_ext::Identity<Type>& name = *reinterpret_cast<::peft_ext::Identity<Type>*>(name##_bytes)
#endif

namespace peft_ext {

constexpr int kWarpSize = 32;

// Identity allows an array type where a reference is declared.
template <typename T>
struct IdentityOf {
  using Type = T;
};
template <typename T>
using Identity = typename IdentityOf<T>::Type;

// Returns the shared memory, aligned to 128 bytes, that the launch asked for in addition to PEFT_EXT_SHARED.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char peft_ext_dynamic_shared[];
  return peft_ext_dynamic_shared;
#else
  return static_cast<unsigned char*>(emulator::dynamic_shared());
#endif
}

// ---- arithmetic

// fmul_rn and fadd_rn: a product and a sum that the compiler may not contract to an FMA. fma_rn: the FMA, which rounds
// a · b + c once.
__device__ __forceinline__ float fmul_rn(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

__device__ __forceinline__ float fadd_rn(float a, float b) {
#ifdef __CUDACC__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

__device__ __forceinline__ float fma_rn(float a, float b, float c) {
#ifdef __CUDACC__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

__device__ __forceinline__ void mul_wide(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
#ifdef __CUDACC__
  // One mul.wide.u32 gives both halves of the 64-bit product. For the expressions a * b and __umulhi(a, b), the
  // compiler does not always use one mul.wide.u32.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
#endif
  low = static_cast<uint32_t>(product);
  high = static_cast<uint32_t>(product >> 32);
}

// prmt: fills the low half of the result with copies of bit 15 of the word, and the high half with copies of bit 31.
__device__ __forceinline__ uint32_t spread_signs(uint32_t word) {
#ifdef __CUDACC__
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(spread) : "r"(word));
  return spread;
#else
  return (word >> 31) * 0xffff0000u + (word >> 15 & 1u) * 0xffffu;
#endif
}

// Fills the result with 32 copies of bit 15 of the word, or of bit 31 if kHigh.
template <bool kHigh>
__device__ __forceinline__ uint32_t spread_sign(uint32_t word) {
#ifdef __CUDACC__
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(spread) : "r"(word), "n"(kHigh ? 0xBBBB : 0x9999));
  return spread;
#else
  return 0u - (word >> (kHigh ? 31 : 15) & 1u);
#endif
}

// cvt.rn.{bf16x2,f16x2}.f32: rounds two floats to T (to nearest, ties to even), and returns both values in one word,
// `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return from_float<bf16>(low).bits | static_cast<uint32_t>(from_float<bf16>(high).bits) << 16;
#endif
}

template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return from_float<f16>(low).bits | static_cast<uint32_t>(from_float<f16>(high).bits) << 16;
#endif
}

// Returns the two 16-bit values of a pair as floats, the low half first. The conversion is exact.
template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t pair) {
#ifdef __CUDACC__
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#else
  return make_float2(bits_to_float(pair << 16), bits_to_float(pair & 0xffff0000u));
#endif
}

template <>
__device__ __forceinline__ float2 unpack2<f16>(uint32_t pair) {
#ifdef __CUDACC__
  float2 values;
  asm("{\n\t.reg .f16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(pair));
  return values;
#else
  return make_float2(to_float(f16{static_cast<uint16_t>(pair)}), to_float(f16{static_cast<uint16_t>(pair >> 16)}));
#endif
}

// ---- global memory

// ld.global.cs: a load whose data leaves the caches first, for data that is not read again soon.
template <typename T>
__device__ __forceinline__ T load_streaming(const T* from) {
#ifdef __CUDACC__
  return __ldcs(from);
#else
  return *from;
#endif
}

// st.global.cs: a store whose data leaves the caches first, for data that is not read again soon.
template <typename T>
__device__ __forceinline__ void store_streaming(T* to, T value) {
#ifdef __CUDACC__
  __stcs(to, value);
#else
  *to = value;
#endif
}

// ld.global.nc: a load through the read-only cache, for memory that no thread of this launch writes.
template <typename T>
__device__ __forceinline__ T load_cached(const T* from) {
#ifdef __CUDACC__
  return __ldg(from);
#else
  return *from;
#endif
}

// Loads 16 bytes like load_cached. The asm volatile keeps the program order of these loads; otherwise the compiler
// would start many loads at once and run out of registers.
__device__ __forceinline__ uint4 load_cached_in_order(const uint4* from) {
#ifdef __CUDACC__
  uint4 words;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(__cvta_generic_to_global(from)));
  return words;
#else
  return *from;
#endif
}

// Adds atomically, in global or shared memory, and returns the previous value. The order of threads is unspecified, so
// that a sum of floats may differ from run to run.
__device__ __forceinline__ float atomic_add(float* to, float value) {
#ifdef __CUDACC__
  return atomicAdd(to, value);
#else
  return emulator::atomic_add(to, value);
#endif
}

__device__ __forceinline__ unsigned atomic_add(unsigned* to, unsigned value) {
#ifdef __CUDACC__
  return atomicAdd(to, value);
#else
  return emulator::atomic_add(to, value);
#endif
}

__device__ __forceinline__ int atomic_add(int* to, int value) {
#ifdef __CUDACC__
  return atomicAdd(to, value);
#else
  return emulator::atomic_add(to, value);
#endif
}

// Orders memory: other blocks see this thread's earlier writes before they see this thread's later writes.
__device__ __forceinline__ void threadfence() {
#ifdef __CUDACC__
  __threadfence();
#else
  emulator::threadfence();
#endif
}

// trap: ends the kernel with an error. Every later call of the driver in the process then fails, as after an assertion
// of PyTorch's kernels.
__device__ __forceinline__ void trap() {
#ifdef __CUDACC__
  __trap();
#else
  emulator::trap();
#endif
}

// ---- blocks and warps

// A barrier of the block. All threads of the block must call the barrier; after the barrier each thread sees the
// earlier writes of all others.
__device__ __forceinline__ void sync_threads() {
#ifdef __CUDACC__
  __syncthreads();
#else
  emulator::sync_threads();
#endif
}

// A barrier of the warp. All 32 lanes must call sync_warp.
__device__ __forceinline__ void sync_warp() {
#ifdef __CUDACC__
  __syncwarp();
#else
  emulator::sync_warp();
#endif
}

// Returns the value of lane `source` of this lane's group of `width` lanes. Only the value of source % width matters.
// All 32 lanes must call shuffle.
__device__ __forceinline__ uint32_t shuffle(uint32_t value, int source, int width = kWarpSize) {
#ifdef __CUDACC__
  return __shfl_sync(0xffffffffu, value, source, width);
#else
  return emulator::shuffle(value, source, width);
#endif
}

__device__ __forceinline__ int shuffle(int value, int source, int width = kWarpSize) {
#ifdef __CUDACC__
  return __shfl_sync(0xffffffffu, value, source, width);
#else
  return static_cast<int>(emulator::shuffle(static_cast<uint32_t>(value), source, width));
#endif
}

__device__ __forceinline__ float shuffle(float value, int source, int width = kWarpSize) {
#ifdef __CUDACC__
  return __shfl_sync(0xffffffffu, value, source, width);
#else
  return bits_to_float(emulator::shuffle(float_to_bits(value), source, width));
#endif
}

// Returns the value of the lane (this lane ^ lane_mask). All 32 lanes must call shuffle_xor.
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int lane_mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
#else
  return emulator::shuffle_xor(value, lane_mask);
#endif
}

__device__ __forceinline__ float shuffle_xor(float value, int lane_mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
#else
  return bits_to_float(emulator::shuffle_xor(float_to_bits(value), lane_mask));
#endif
}

// Returns a word whose bit l is the vote of lane l. All 32 lanes must call ballot.
__device__ __forceinline__ uint32_t ballot(bool vote) {
#ifdef __CUDACC__
  return __ballot_sync(0xffffffffu, vote);
#else
  return emulator::ballot(vote);
#endif
}

// Returns whether the vote of any lane is true. All 32 lanes must call any_lane.
__device__ __forceinline__ bool any_lane(bool vote) {
#ifdef __CUDACC__
  return __any_sync(0xffffffffu, vote) != 0;
#else
  return emulator::ballot(vote) != 0;
#endif
}

// ---- shared memory by address

// An address in shared memory. Device code uses the 32-bit address in shared memory: a pointer would take two
// registers, and one more instruction at each use.
struct SharedAt {
#ifdef __CUDACC__
  uint32_t at;
  __device__ __forceinline__ SharedAt operator+(uint32_t bytes) const { return {at + bytes}; }
  __device__ __forceinline__ SharedAt operator^(uint32_t bits) const { return {at ^ bits}; }
#else
  unsigned char* at;
  SharedAt operator+(uint32_t bytes) const { return {at + bytes}; }
  SharedAt operator^(uint32_t bits) const {
    return {reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(at) ^ bits)};
  }
#endif
};

__device__ __forceinline__ SharedAt shared_at(const void* shared) {
#ifdef __CUDACC__
  return {static_cast<uint32_t>(__cvta_generic_to_shared(shared))};
#else
  return {static_cast<unsigned char*>(const_cast<void*>(shared))};
#endif
}

// Loads 16 bytes from an address in shared memory that is aligned to 16 bytes.
__device__ __forceinline__ uint4 load_shared_16(SharedAt from) {
#ifdef __CUDACC__
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(from.at)
               : "memory");
  return words;
#else
  return *reinterpret_cast<const uint4*>(from.at);
#endif
}

// Loads 4 bytes from an address in shared memory that is aligned to 4 bytes.
__device__ __forceinline__ uint32_t load_shared_4(SharedAt from) {
#ifdef __CUDACC__
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from.at) : "memory");
  return word;
#else
  return *reinterpret_cast<const uint32_t*>(from.at);
#endif
}

__device__ __forceinline__ void store_shared_16(SharedAt to, uint4 words) {
#ifdef __CUDACC__
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to.at), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to.at) = words;
#endif
}

// ---- asynchronous copies

// cp.async of 16, 8 or 4 bytes; both addresses are aligned to the size of the copy. If `take` is false, the destination
// gets zeros, and `global` is not read and may be any pointer of the same alignment. This thread sees the bytes after
// the cp_async_wait that waits for the copy's group; other threads see the bytes after a barrier that follows this
// wait. A copy of 16 bytes bypasses L1 (.cg); a smaller copy goes through L1 (.ca).
__device__ __forceinline__ void cp_async_16(SharedAt shared, const void* global, bool take) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared.at), "l"(__cvta_generic_to_global(global)),
               "r"(take ? 16 : 0)
               : "memory");
#else
  emulator::cp_async(shared.at, global, 16, take);
#endif
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool take) {
  cp_async_16(shared_at(shared), global, take);
}

__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool take) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global)), "r"(take ? 8 : 0)
      : "memory");
#else
  emulator::cp_async(shared, global, 8, take);
#endif
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool take) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global)), "r"(take ? 4 : 0)
      : "memory");
#else
  emulator::cp_async(shared, global, 4, take);
#endif
}

// Closes a group of copies: all copies of this thread since its last cp_async_commit. A group may be empty.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}

// Waits until at most the kPending youngest groups of this thread are still running.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::cp_async_wait(kPending);
#endif
}

// ---- matrix products. The fragments of ldmatrix and mma are described with g = l / 4 and t = l % 4 for lane l. A
// register holds two 16-bit values; the first value is in the low half.

// Loads four 8x8 matrices of 16-bit values from shared memory. Lane l passes the address of row l % 8 of matrix l / 8;
// a row has 16 bytes and is aligned to 16 bytes. r[i] of lane l gets row g, columns 2t and 2t + 1, of matrix i. All 32
// lanes must call ldmatrix_x4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAt row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.at)
               : "memory");
#else
  emulator::ldmatrix_x4(r, row.at, false);
#endif
}

// Loads four 8x8 matrices like ldmatrix_x4, transposed: r[i] of lane l gets rows 2t and 2t + 1, column g, of matrix i.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAt row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.at)
               : "memory");
#else
  emulator::ldmatrix_x4(r, row.at, true);
#endif
}

// Computes C [16, 8] += A [16, 16] B [16, 8]; T is bf16 or f16, and sums are float. All 32 lanes must call
// mma_m16n8k16. A lane holds
//   a[i]: row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next column;
//   b[i]: rows 2t + 8 i and the next row, column g;
//   c[i]: row g + 8 (i / 2), column 2t + i % 2
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_m16n8k16_bf16(c, a, b);
#endif
}

template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_m16n8k16_f16(c, a, b);
#endif
}

}  // namespace peft_ext
