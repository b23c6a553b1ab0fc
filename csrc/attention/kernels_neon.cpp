// The attention kernels of attention/kernels.h with NEON.
#if defined(__aarch64__)
#include <math.h>

#include <utility>

#include "cpu/simd_neon.h"

#include "attention/transpose_scalar.h"
#include "attention/words_f32.h"

#include "attention/product.h"

#include "attention/kernels_impl.h"

namespace peft_ext {

const AttentionKernels kAttentionKernelsNeon = kTable;

}  // namespace peft_ext
#endif
