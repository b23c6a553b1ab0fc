// The C functions of the native library that peft_ext's Python code and tools call, in addition to the operators. The
// library exports no other symbols.
#pragma once

#include <stdint.h>

#define PEFT_EXT_API extern "C" __attribute__((visibility("default")))

namespace peft_ext {
// The digest of csrc/ in build/source_digest.cpp, which the native library and the module _C each contain.
extern const char kSourceDigest[];
}  // namespace peft_ext

// Functions about the build and about the CPU paths. The library owns the returned strings. An argument `isa` is the
// number of a CPU path, from 0 to peft_ext_isa_count() - 1.
PEFT_EXT_API const char* peft_ext_version();
PEFT_EXT_API const char* peft_ext_built_for_torch();  // the version of torch whose headers the build used
PEFT_EXT_API const char* peft_ext_oldest_torch();     // the oldest version of torch that the library runs on
PEFT_EXT_API const char* peft_ext_compiler();
PEFT_EXT_API const char* peft_ext_source_digest();  // the digest of csrc/ that peft_ext/_source_digest.py computes
PEFT_EXT_API int peft_ext_isa_count();
PEFT_EXT_API const char* peft_ext_isa_name(int isa);
PEFT_EXT_API int peft_ext_isa_compiled(int isa);  // 1 if the library contains the CPU path `isa`, else 0
// 1 if the library contains the CPU path `isa` and this process may run its instructions, else 0
PEFT_EXT_API int peft_ext_isa_available(int isa);
PEFT_EXT_API int peft_ext_isa();              // number of the CPU path that the next call uses
PEFT_EXT_API void peft_ext_set_isa(int isa);  // chooses the CPU path of later calls; the path must be available

// Registers the operators' functions for a dispatch key, "CPU" or "CUDA", in a namespace of torch.ops. The caller
// decides which keys are registered, because a ROCm build of PyTorch also dispatches its GPU tensors by the key "CUDA".
PEFT_EXT_API void peft_ext_register_operators(const char* key, const char* name_space);
// The scratch memory that threads keep between calls of CPU operators, in bytes.
PEFT_EXT_API uint64_t peft_ext_kept_scratch();
// Releases the scratch memory of all threads that are not in a call of an operator. Returns the number of released
// bytes.
PEFT_EXT_API uint64_t peft_ext_release_scratch();

// Forgets the lists that the operator decoder_layer keeps under the number `plan`.
PEFT_EXT_API void peft_ext_forget_plan(int64_t plan);

// The number of parallel loops of CPU operators that woke other threads since the library was loaded.
PEFT_EXT_API uint64_t peft_ext_parallel_loops();
// 1: each stage of a parallel loop (see cpu/stages.h) runs as a parallel loop of its own, with the same results, for a
// tool that runs the parts of a loop one after another. 0: the stages run in one loop, as by default.
PEFT_EXT_API void peft_ext_stages_as_loops(int on);

// Functions about the CUDA kernels that the operators launch, and about the sources from which NVRTC compiles the
// kernels.
PEFT_EXT_API int peft_ext_kernel_count();
// peft_ext_kernel_name returns the C++ expression that names a kernel (namespace, name and template arguments);
// peft_ext_kernel_file returns the path of the source that defines the kernel.
PEFT_EXT_API const char* peft_ext_kernel_name(int kernel);
PEFT_EXT_API const char* peft_ext_kernel_file(int kernel);
PEFT_EXT_API int peft_ext_source_count();
PEFT_EXT_API const char* peft_ext_source_path(int source);
PEFT_EXT_API const char* peft_ext_source_text(int source);

// The machine code of a kernel, or an error. The pointers of an image must stay valid until the thread that asked for
// the image asks for another image.
struct PeftExtImage {
  const char* symbol;  // the kernel's name in the machine code
  const void* data;    // the machine code: a cubin, or PTX
  const char* error;   // the reason why there is no machine code; null: no error
};
// A function that sets `image` to the machine code of a kernel for a compute capability (10 · major + minor).
typedef void (*PeftExtImageSource)(const char* name, const char* file, int capability, PeftExtImage* image);
PEFT_EXT_API void peft_ext_set_image_source(PeftExtImageSource source);
