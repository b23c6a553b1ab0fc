// Which CPU path runs: chosen once by CPUID bits, forced by set_isa (PEFT_EXT_CPU_ISA in Python).
// Torch-free: pybind11's file includes it too.
#pragma once

namespace peft_ext {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kIsaCount = 3;

const char* isa_name(Isa isa);
// Compiled into this library and supported by this CPU.
bool isa_available(Isa isa);
Isa current_isa();
void set_current_isa(Isa isa);
// AVX512-BF16's dot product, beyond what kAvx512 asks for.
bool cpu_has_avx512_bf16();

// A kernel table holds one op's function pointers; each instruction set exports one, or null where it has none of its
// own. The next lower one serves then.
template <typename Table>
const Table& select_kernels(const Table* scalar, const Table* avx2, const Table* avx512) {
  const Isa isa = current_isa();
  if (isa == Isa::kAvx512 && avx512 != nullptr) return *avx512;
  if (isa >= Isa::kAvx2 && avx2 != nullptr) return *avx2;
  return *scalar;
}

}  // namespace peft_ext
