// Includes all kernels of one instruction set, so that a kernel table can be filled. Include this file after the target
// pragma and after the instruction set's Vec (cpu/simd_<isa>.h).
#pragma once

#include "linear/cpu/kernels/column_pass.h"
#include "linear/cpu/kernels/dropped.h"
#include "linear/cpu/kernels/expand.h"
#include "linear/cpu/kernels/few_tokens.h"
#include "linear/cpu/kernels/rank_pass.h"
