// The kernel of cross_entropy.h with AVX-512.
#if defined(__x86_64__)
#include "cpu/target_avx512.h"
// The headers below must be included after the target pragma.
#include "cpu/simd_avx512.h"
#include "cross_entropy/cross_entropy_impl.h"

namespace peft_ext {

const CrossEntropyKernels kCrossEntropyAvx512 = {rows};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
