// The attention kernels of attention/kernels.h for bfloat16 tensors, with emulated AMX tiles, on a CPU with
// AVX512-BF16.
#if defined(__x86_64__)
#include <math.h>

#include <utility>

#include "cpu/target_avx512bf16.h"
// target_avx512bf16.h selects the instruction set for the code of the headers below, and must be included before them.
#include "cpu/simd_avx512.h"

#include "attention/transpose_avx512.h"
#include "attention/words_bf16.h"
#include "linear/cpu/tiles/amx_emulated.h"

#include "attention/product_amx.h"

#include "attention/kernels_impl.h"

namespace peft_ext {

const AttentionKernels kAttentionKernelsAmxEmulated = kTable;

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
