// Includes the code of the tile kernels in AVX-512 with BF16, except the microkernel, so that the file that includes
// tiles_avx512.h can fill a table TileKernels. Include this file after the target pragma (cpu/target_<isa>.h) and after
// microkernel_amx.h or microkernel_avx512.h.
#pragma once

#include "linear/cpu/tiles/row_avx512.h"
#include "linear/cpu/tiles/decode_avx512.h"
#include "linear/cpu/tiles/dropped_avx512.h"
#include "linear/cpu/tiles/few_tokens_avx512.h"
#include "linear/cpu/tiles/strips_avx512.h"
// The order of the headers below matters: each header uses definitions of headers that were included before.
#include "linear/cpu/tiles/backward.h"
#include "linear/cpu/tiles/forward.h"
