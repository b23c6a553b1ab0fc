// The cross-entropy kernel of cross_entropy.h in plain C++, for any CPU.
#include "cpu/simd_scalar.h"
#include "cross_entropy/cross_entropy_impl.h"

namespace peft_ext {

const CrossEntropyKernels kCrossEntropyScalar = {rows};

}  // namespace peft_ext
