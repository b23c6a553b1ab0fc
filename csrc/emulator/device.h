// Replaces cuda_runtime.h when g++ compiles kernels for the emulator: CUDA's keywords and vector types, and the
// functions that the wrappers of cuda/ptx.cuh call. The compiler includes the file first (-include), because the file
// renames memcpy, memmove and memset, which compiled code may call for copies that no __tsan hook reports
// (emulator/hooks.cpp).
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef PEFT_EXT_EMULATE_CUDA
extern "C" {
void* memcpy(void* __restrict to, const void* __restrict from,
             size_t bytes) noexcept(true) __asm__("peft_ext_emulator_memcpy");
void* memmove(void* to, const void* from, size_t bytes) noexcept(true) __asm__("peft_ext_emulator_memmove");
void* memset(void* to, int value, size_t bytes) noexcept(true) __asm__("peft_ext_emulator_memset");
}
#endif

#include <math.h>

#define __global__ __attribute__((unused))  // `unused`: no warning about a kernel that a source file does not launch
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

#define PEFT_EXT_VECTOR2(Name, Type)      \
  struct alignas(2 * sizeof(Type)) Name { \
    Type x, y;                            \
  };                                      \
  inline Name make_##Name(Type x, Type y) { return Name{x, y}; }
#define PEFT_EXT_VECTOR4(Name, Type)      \
  struct alignas(4 * sizeof(Type)) Name { \
    Type x, y, z, w;                      \
  };                                      \
  inline Name make_##Name(Type x, Type y, Type z, Type w) { return Name{x, y, z, w}; }
PEFT_EXT_VECTOR2(float2, float)
PEFT_EXT_VECTOR4(float4, float)
PEFT_EXT_VECTOR2(int2, int)
PEFT_EXT_VECTOR4(int4, int)
PEFT_EXT_VECTOR2(uint2, unsigned)
PEFT_EXT_VECTOR4(uint4, unsigned)
PEFT_EXT_VECTOR2(ushort2, unsigned short)
PEFT_EXT_VECTOR4(ushort4, unsigned short)
PEFT_EXT_VECTOR2(uchar2, unsigned char)
PEFT_EXT_VECTOR4(uchar4, unsigned char)
#undef PEFT_EXT_VECTOR2
#undef PEFT_EXT_VECTOR4

namespace peft_ext {
namespace emulator {

// The indices of the running emulated thread and block, and the sizes of the block and the grid. These values are
// constant while a kernel's function runs, so that the compiler may merge calls of one of these functions.
__attribute__((const)) dim3 thread_index();
__attribute__((const)) dim3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

// Returns the running block's shared memory for the PEFT_EXT_SHARED declaration that `key` identifies.
void* static_shared(const void* key, size_t bytes, const char* name);
void* dynamic_shared();

void sync_threads();
void sync_warp();
uint32_t shuffle(uint32_t value, int source, int width);
uint32_t shuffle_xor(uint32_t value, int lane_mask);
uint32_t ballot(bool vote);
void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed);
void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

void cp_async(void* shared, const void* global, int bytes, bool take);
void cp_async_commit();
void cp_async_wait(int pending);

float atomic_add(float* to, float value);
unsigned atomic_add(unsigned* to, unsigned value);
int atomic_add(int* to, int value);
void threadfence();
[[noreturn]] void trap();

}  // namespace emulator
}  // namespace peft_ext

#define threadIdx (::peft_ext::emulator::thread_index())
#define blockIdx (::peft_ext::emulator::block_index())
#define blockDim (::peft_ext::emulator::block_size())
#define gridDim (::peft_ext::emulator::grid_size())

inline void __syncthreads() { ::peft_ext::emulator::sync_threads(); }
inline void __syncwarp() { ::peft_ext::emulator::sync_warp(); }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
