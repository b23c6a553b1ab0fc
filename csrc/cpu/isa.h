// The choice of the CPU path: detected once from the features of the CPU, or set by set_current_isa (for example for
// the environment variable PEFT_EXT_CPU_ISA). The file does not depend on torch.
#pragma once

// Clang before 16 supports Arm's bfloat16 only if the command line enables it.
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_BF16))
#define PEFT_EXT_ARM_BF16 1
#endif

namespace peft_ext {

// The paths of each architecture, in ascending order. A CPU that supports a path also supports the earlier paths of its
// architecture, with one exception: kAmxEmulated does not need a CPU with AMX. The path kAmxEmulated runs the AMX
// kernels with emulated tiles, is for tests, and is never chosen by default.
enum class Isa : int { kScalar = 0, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated, kNeon, kNeonBf16 };
constexpr int kIsaCount = 8;

const char* isa_name(Isa isa);
// Returns whether the library contains the path: the path belongs to the architecture of the build, and for kNeonBf16
// the compiler supports Arm's bfloat16.
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
// Returns whether the library contains the path, the CPU supports the path, and, for kAmx, Linux grants the tile
// registers.
bool isa_available(Isa isa);
// Returns the path of the calling thread's running call, or outside of a call the path that the next call will use.
Isa current_isa();
// Chooses the CPU path of later calls of operators. A running call keeps its path.
void set_current_isa(Isa isa);

// While an IsaOfCall object exists, current_isa() is constant on the calling thread. An operator may read the path
// several times in one call, and the kernels of two paths must not be mixed.
class IsaOfCall {
 public:
  explicit IsaOfCall(Isa isa = current_isa());
  IsaOfCall(const IsaOfCall&) = delete;
  IsaOfCall& operator=(const IsaOfCall&) = delete;
  ~IsaOfCall();

 private:
  const int before_;
};

// Returns the table of function pointers to the kernels of an operator for the current path. If avx512 or avx2 is null
// (no kernels for this instruction set), the table of the next lower instruction set is returned; the paths
// avx512_bf16, amx and amx_emulated get the table for AVX-512, and the path neon_bf16 gets the table for NEON.
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
