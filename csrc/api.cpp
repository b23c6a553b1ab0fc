// Defines the functions of common/api.h about the build, the CPU paths, scratch memory and parallel loops.
#include "common/api.h"

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/stages.h"
#include "cpu/threads.h"

using peft_ext::Isa;

const char* peft_ext_version() { return PEFT_EXT_VERSION; }
const char* peft_ext_built_for_torch() { return PEFT_EXT_TORCH; }
const char* peft_ext_oldest_torch() { return PEFT_EXT_TORCH_TARGET; }

const char* peft_ext_source_digest() { return peft_ext::kSourceDigest; }

const char* peft_ext_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

int peft_ext_isa_count() { return peft_ext::kIsaCount; }
const char* peft_ext_isa_name(int isa) { return peft_ext::isa_name(static_cast<Isa>(isa)); }
int peft_ext_isa_compiled(int isa) { return peft_ext::isa_compiled(static_cast<Isa>(isa)); }
int peft_ext_isa_available(int isa) { return peft_ext::isa_available(static_cast<Isa>(isa)); }
int peft_ext_isa() { return static_cast<int>(peft_ext::current_isa()); }
void peft_ext_set_isa(int isa) { peft_ext::set_current_isa(static_cast<Isa>(isa)); }

uint64_t peft_ext_kept_scratch() { return peft_ext::kept_scratch(); }
uint64_t peft_ext_release_scratch() { return peft_ext::release_scratch(); }
uint64_t peft_ext_parallel_loops() { return peft_ext::parallel_loops; }
void peft_ext_stages_as_loops(int on) { peft_ext::Stages::as_loops = on != 0; }
