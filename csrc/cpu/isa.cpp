// Detects the instruction sets of the CPU, and holds the CPU path of later calls and the path of each thread's running
// call. See isa.h.
#include "cpu/isa.h"

#include <atomic>
#include <initializer_list>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PEFT_EXT_X86 1
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace peft_ext {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2",         "avx512", "avx512_bf16",
                                           "amx",    "amx_emulated", "neon",   "neon_bf16"};

Isa best_isa() {
  for (const Isa isa : {Isa::kNeonBf16, Isa::kNeon, Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2})
    if (isa_available(isa)) return isa;
  return Isa::kScalar;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

constexpr int kNoCall = -1;
thread_local int isa_of_call = kNoCall;  // the CPU path of this thread's running call

#if defined(PEFT_EXT_X86)
// Returns whether CPUID reports F16C. Some compilers' __builtin_cpu_supports does not accept the name "f16c".
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kF16c = 1u << 29;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & kF16c) != 0;
}
#endif

#if defined(__aarch64__)
// Returns whether the Arm CPU has the bfloat16 extension.
bool has_arm_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

#if defined(PEFT_EXT_X86) && defined(__linux__)
// Returns whether CPUID reports AMX-TILE and AMX-BF16, and Linux grants the tile registers, which a process must
// request.
bool amx_granted() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif defined(PEFT_EXT_X86)
bool amx_granted() { return false; }
#endif

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
#if defined(PEFT_EXT_X86)
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case Isa::kAvx512:
      return isa_available(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx512Bf16:
    case Isa::kAmxEmulated:
      return isa_available(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::kAmx: {
      static const bool granted = isa_available(Isa::kAvx512Bf16) && amx_granted();
      return granted;
    }
    case Isa::kNeon:
    case Isa::kNeonBf16:
      return false;
  }
  return false;
#elif defined(__aarch64__)
  return isa_compiled(isa) && (isa != Isa::kNeonBf16 || has_arm_bf16());
#else
  return isa == Isa::kScalar;
#endif
}

Isa current_isa() {
  return isa_of_call == kNoCall ? chosen().load(std::memory_order_relaxed) : static_cast<Isa>(isa_of_call);
}

void set_current_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

IsaOfCall::IsaOfCall(Isa isa) : before_(isa_of_call) { isa_of_call = static_cast<int>(isa); }

IsaOfCall::~IsaOfCall() { isa_of_call = before_; }

}  // namespace peft_ext
