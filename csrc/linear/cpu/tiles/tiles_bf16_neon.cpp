// Compiles the tile kernels of tiles.h for Arm's bfloat16 matrix product.
#include "cpu/isa.h"

#if defined(PEFT_EXT_ARM_BF16)
#include "cpu/target_bf16_neon.h"
// The headers below must be included after the target pragma (cpu/target_<isa>.h).
#include "linear/cpu/tiles/microkernel_neon.h"
#include "linear/cpu/tiles/row_neon.h"
// dropped_neon.h and strips_neon.h use the definitions of microkernel_neon.h and row_neon.h.
#include "linear/cpu/tiles/dropped_neon.h"
#include "linear/cpu/tiles/strips_neon.h"
// backward.h and forward.h use the definitions of all headers that were included before.
#include "linear/cpu/tiles/backward.h"
#include "linear/cpu/tiles/forward.h"

namespace peft_ext {

// The table of the tile kernels for Arm has no kernels for few tokens. In the forward over a dense weight, the kernels
// of kernels_neon.cpp compute up to 8 tokens, and PyTorch's product computes more tokens, up to the number from which
// the tiles are used.
const TileKernels kTileKernelsNeonBf16 = {kDecodeStrips, token_strips, token_strips, dropped_entries,
                                          forward,       backward,     nullptr,      nullptr};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
