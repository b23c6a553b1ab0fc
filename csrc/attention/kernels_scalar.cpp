// The attention kernels of attention/kernels.h in plain C++, for any CPU.
#include <math.h>

#include <utility>

#include "cpu/simd_scalar.h"

#include "attention/transpose_scalar.h"
#include "attention/words_f32.h"

#include "attention/product.h"

#include "attention/kernels_impl.h"

namespace peft_ext {

const AttentionKernels kAttentionKernelsScalar = kTable;

}  // namespace peft_ext
