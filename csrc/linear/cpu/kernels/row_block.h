// Declares RowBlock, a block of float32 rows that fits L1 and is used by expand.h, and the sizes of blocks that several
// kernels share. The code is written over the type Vec (cpu/simd_<isa>.h), and included after the target pragma.
#pragma once

#include "cpu/philox_impl.h"
#include "cpu/token_groups.h"
#include "linear/cpu/kernels/kernels.h"

namespace peft_ext {
namespace {

constexpr int kTokens = kRowsTogether;
constexpr int kPanel = kColumnsTogether;

struct RowBlock {
  alignas(64) float values[kTokens][kPanel];
  alignas(64) uint16_t draws[draws_room(kPanel)];
};

}  // namespace
}  // namespace peft_ext
