// The low-rank path with AVX2. See lora_kernels.h for the contract, lora_impl.h for the code.
#if defined(__x86_64__)
#include "common/target_avx2.h"
// The target must be set before these headers are read.
#include "common/simd_avx2.h"
#include "lora/lora_impl.h"

namespace peft_ext {

const LoraKernels kLoraKernelsAvx2 = {row_pass, expand, keep_mask, few_tokens, column_pass};

}  // namespace peft_ext
#include "common/target_end.h"
#endif
