// The tile kernels in AVX-512 with BF16 but for the microkernel: after this file a kernel table can be filled. Included
// after the target pragma and the microkernel's file (see block.h).
#pragma once

#include "linear/cpu/tiles/row_avx512.h"
#include "linear/cpu/tiles/decode_avx512.h"
#include "linear/cpu/tiles/dropped_avx512.h"
#include "linear/cpu/tiles/few_tokens_avx512.h"
#include "linear/cpu/tiles/strips_avx512.h"
// What the files above give is what these are written in.
#include "linear/cpu/tiles/backward.h"
#include "linear/cpu/tiles/forward.h"
