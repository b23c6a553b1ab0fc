// Declares RowBlock, a block of rows that several kernels widen to float32 in L1. The code is written over the type Vec
// (cpu/simd_<isa>.h), and included after the target pragma.
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
