// The functions that code compiled with g++ -fsanitize=thread,bounds-strict,alignment calls: for each access to memory
// that may be other memory than a local variable, for each index beyond an array, and for each access through a
// misaligned pointer. These hooks replace the sanitizers' runtime libraries, which are not linked. This file is
// compiled without -fsanitize.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulator/machine.h"

#define SITE __builtin_return_address(0)

using peft_ext::emulator::Access;
using peft_ext::emulator::check_access;
using peft_ext::emulator::current;
using peft_ext::emulator::fault;

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct OutOfBoundsData {
  SourceLocation location;
  const TypeDescriptor* array;
  const TypeDescriptor* index;
};
struct TypeMismatchData {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log2_alignment, kind;
};

// Prints an error of host code and ends the process, because no caller would catch an exception.
[[noreturn]] void die(const SourceLocation& location, const char* what) {
  fprintf(stderr, "%s:%u: %s\n", location.file, location.line, what);
  abort();
}

}  // namespace

extern "C" {

#define PEFT_EXT_HOOKS(bytes)                                                                            \
  void __tsan_read##bytes(void* at) { check_access(at, bytes, Access::kRead, SITE); }                    \
  void __tsan_write##bytes(void* at) { check_access(at, bytes, Access::kWrite, SITE); }                  \
  void __tsan_volatile_read##bytes(void* at) { check_access(at, bytes, Access::kRead, SITE); }           \
  void __tsan_volatile_write##bytes(void* at) { check_access(at, bytes, Access::kWrite, SITE); }         \
  void __tsan_unaligned_read##bytes(void* at) { check_access(at, bytes, Access::kRead, SITE); }          \
  void __tsan_unaligned_write##bytes(void* at) { check_access(at, bytes, Access::kWrite, SITE); }        \
  void __tsan_unaligned_volatile_read##bytes(void* at) { check_access(at, bytes, Access::kRead, SITE); } \
  void __tsan_unaligned_volatile_write##bytes(void* at) { check_access(at, bytes, Access::kWrite, SITE); }
PEFT_EXT_HOOKS(1)
PEFT_EXT_HOOKS(2)
PEFT_EXT_HOOKS(4)
PEFT_EXT_HOOKS(8)
PEFT_EXT_HOOKS(16)

void __tsan_read_range(void* at, unsigned long bytes) { check_access(at, bytes, Access::kRead, SITE); }
void __tsan_write_range(void* at, unsigned long bytes) { check_access(at, bytes, Access::kWrite, SITE); }
void __tsan_vptr_update(void** at, void*) { check_access(at, sizeof(void*), Access::kWrite, SITE); }
void __tsan_vptr_read(void** at) { check_access(at, sizeof(void*), Access::kRead, SITE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// Hooks for std::atomic operations and for the guards of local static variables, both of which only host code has.
#define PEFT_EXT_ATOMIC_UPDATE(bits, name, builtin)                                            \
  uint##bits##_t __tsan_atomic##bits##_##name(uint##bits##_t* at, uint##bits##_t value, int) { \
    check_access(at, bits / 8, Access::kAtomic, SITE);                                         \
    return builtin(at, value, __ATOMIC_SEQ_CST);                                               \
  }
#define PEFT_EXT_ATOMICS(bits)                                                                                        \
  uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* at, int) {                                          \
    check_access(at, bits / 8, Access::kAtomic, SITE);                                                                \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                                   \
  void __tsan_atomic##bits##_store(uint##bits##_t* at, uint##bits##_t value, int) {                                   \
    check_access(at, bits / 8, Access::kAtomic, SITE);                                                                \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                                    \
  }                                                                                                                   \
  PEFT_EXT_ATOMIC_UPDATE(bits, exchange, __atomic_exchange_n)                                                         \
  PEFT_EXT_ATOMIC_UPDATE(bits, fetch_add, __atomic_fetch_add)                                                         \
  PEFT_EXT_ATOMIC_UPDATE(bits, fetch_sub, __atomic_fetch_sub)                                                         \
  PEFT_EXT_ATOMIC_UPDATE(bits, fetch_and, __atomic_fetch_and)                                                         \
  PEFT_EXT_ATOMIC_UPDATE(bits, fetch_or, __atomic_fetch_or)                                                           \
  PEFT_EXT_ATOMIC_UPDATE(bits, fetch_xor, __atomic_fetch_xor)                                                         \
  int __tsan_atomic##bits##_compare_exchange_strong(uint##bits##_t* at, uint##bits##_t* expected,                     \
                                                    uint##bits##_t value, int, int) {                                 \
    check_access(at, bits / 8, Access::kAtomic, SITE);                                                                \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
  }                                                                                                                   \
  int __tsan_atomic##bits##_compare_exchange_weak(uint##bits##_t* at, uint##bits##_t* expected, uint##bits##_t value, \
                                                  int, int) {                                                         \
    check_access(at, bits / 8, Access::kAtomic, SITE);                                                                \
    return __atomic_compare_exchange_n(at, expected, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                \
  }
PEFT_EXT_ATOMICS(8)
PEFT_EXT_ATOMICS(16)
PEFT_EXT_ATOMICS(32)
PEFT_EXT_ATOMICS(64)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

// The functions to which emulator/device.h renames memcpy, memmove and memset in compiled kernels.
void* peft_ext_emulator_memcpy(void* to, const void* from, size_t bytes) {
  check_access(from, bytes, Access::kRead, SITE);
  check_access(to, bytes, Access::kWrite, SITE);
  return memcpy(to, from, bytes);
}
void* peft_ext_emulator_memmove(void* to, const void* from, size_t bytes) {
  check_access(from, bytes, Access::kRead, SITE);
  check_access(to, bytes, Access::kWrite, SITE);
  return memmove(to, from, bytes);
}
void* peft_ext_emulator_memset(void* to, int value, size_t bytes) {
  check_access(to, bytes, Access::kWrite, SITE);
  return memset(to, value, bytes);
}

void __ubsan_handle_out_of_bounds(const OutOfBoundsData* data, unsigned long index) {
  if (!current.active) die(data->location, "index out of bounds");
  // The compiler passes an index of a signed type with fewer than 64 bits zero-extended.
  const int bits = 1 << (data->index->info >> 1);
  const int unused = 64 - bits;
  const bool is_signed = (data->index->info & 1) != 0;
  const long long value = is_signed ? static_cast<long long>(index << unused) >> unused : static_cast<long long>(index);
  fault(SITE, "index %lld out of bounds of %s", value, data->array->name);
}

void __ubsan_handle_type_mismatch_v1(const TypeMismatchData* data, unsigned long) {
  if (!current.active) die(data->location, "misaligned access");
  fault(SITE, "misaligned access: %s at an address that is not a multiple of %d", data->type->name,
        1 << data->log2_alignment);
}

}  // extern "C"
