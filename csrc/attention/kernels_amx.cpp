// The attention kernels of attention/kernels.h for bfloat16 tensors, with AMX-BF16. The code in cpu/isa.cpp requests
// the tile registers from the operating system, once per process.
#if defined(__x86_64__)
#include <math.h>

#include <utility>

#include "cpu/target_amx.h"
// target_amx.h selects the instruction set for the code of the headers below, and must be included before them.
#include "cpu/simd_avx512.h"

#include "attention/transpose_avx512.h"
#include "attention/words_bf16.h"
#include "linear/cpu/tiles/amx.h"

#include "attention/product_amx.h"

#include "attention/kernels_impl.h"

namespace peft_ext {

const AttentionKernels kAttentionKernelsAmx = kTable;

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
