// The tile kernels of tiles.h with Arm's bfloat16 matrix product.
#include "cpu/isa.h"

#if defined(PEFT_EXT_ARM_BF16)
#include "cpu/target_bf16_neon.h"
// These headers must be included after the target pragma.
#include "linear/cpu/tiles/microkernel_neon.h"
#include "linear/cpu/tiles/row_neon.h"
// The files below use the definitions of the files above.
#include "linear/cpu/tiles/dropped_neon.h"
#include "linear/cpu/tiles/strips_neon.h"
// The files below use the definitions of all files above.
#include "linear/cpu/tiles/backward.h"
#include "linear/cpu/tiles/forward.h"

namespace peft_ext {

// The path has no kernels for few tokens: PyTorch's product computes few tokens.
const TileKernels kTileKernelsNeonBf16 = {kDecodeStrips, token_strips, token_strips, dropped_entries,
                                          forward,       backward,     nullptr,      nullptr};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
