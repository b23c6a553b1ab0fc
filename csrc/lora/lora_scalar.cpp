// The low-rank path on any CPU. See lora_kernels.h for the contract, lora_impl.h for the code.
#include "common/simd_scalar.h"
#include "lora/lora_impl.h"

namespace peft_ext {

const LoraKernels kLoraKernelsScalar = {row_pass, expand, keep_mask, few_tokens, column_pass};

}  // namespace peft_ext
