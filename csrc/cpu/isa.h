// Which CPU path runs: chosen once by CPUID bits, forced by set_isa (PEFT_EXT_CPU_ISA in Python).
// Torch-free: pybind11's file includes it too.
#pragma once

// Clang before 16 has Arm's bfloat16 only where the command line asks for it.
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_BF16))
#define PEFT_EXT_ARM_BF16 1
#endif

namespace peft_ext {

// In ascending order on either machine: each has what the ones before it have. kAmxEmulated, AMX's kernels over tiles
// in plain code, is for tests and is never chosen by itself.
enum class Isa : int { kScalar = 0, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated, kNeon, kNeonBf16 };
constexpr int kIsaCount = 8;

const char* isa_name(Isa isa);
// Of the machine that this library was compiled for.
constexpr bool isa_compiled(Isa isa) {
#if defined(__x86_64__)
  return isa < Isa::kNeon;
#elif defined(PEFT_EXT_ARM_BF16)
  return isa == Isa::kScalar || isa >= Isa::kNeon;
#elif defined(__aarch64__)
  return isa == Isa::kScalar || isa == Isa::kNeon;
#else
  return isa == Isa::kScalar;
#endif
}
// Compiled into this library and supported by this CPU (and, for AMX's registers, granted by the system).
bool isa_available(Isa isa);
Isa current_isa();
void set_current_isa(Isa isa);

// A kernel table holds one op's function pointers; each instruction set exports one, or null where it has none of its
// own. The next lower one serves then.
template <typename Table>
const Table& select_kernels(const Table* scalar, const Table* avx2, const Table* avx512) {
  const Isa isa = current_isa();
  if (isa >= Isa::kAvx512 && avx512 != nullptr) return *avx512;
  if (isa >= Isa::kAvx2 && avx2 != nullptr) return *avx2;
  return *scalar;
}
template <typename Table>
const Table& select_kernels(const Table* scalar, const Table* neon) {
  return current_isa() >= Isa::kNeon ? *neon : *scalar;
}

}  // namespace peft_ext
