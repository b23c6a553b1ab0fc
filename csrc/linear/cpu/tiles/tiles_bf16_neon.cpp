// The tile kernels with Arm's matrix product of bfloat16. See tiles.h for the contract.
#include "cpu/isa.h"

#if defined(PEFT_EXT_ARM_BF16)
#include "cpu/target_bf16_neon.h"
// The target must be set before these headers are read.
#include "linear/cpu/tiles/microkernel_neon.h"
#include "linear/cpu/tiles/row_neon.h"
// What the files above give is what these are written in.
#include "linear/cpu/tiles/dropped_neon.h"
#include "linear/cpu/tiles/strips_neon.h"
// And these in all of them.
#include "linear/cpu/tiles/backward.h"
#include "linear/cpu/tiles/forward.h"

namespace peft_ext {

// Few tokens are PyTorch's.
const TileKernels kTileKernelsNeonBf16 = {kDecodeStrips, token_strips, token_strips, dropped_entries,
                                          forward,       backward,     nullptr,      nullptr};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
