// The formats of packed weights. FORMAT(number, struct): `number` is the format's number in the operators' argument
// `layout` and in peft_ext/weights/; 0 is NF4, which csrc/nf4 decodes. Each struct has
//
//   const char* refused(w);          null, or which group, option or shape the format wants instead of those of w
//   int64_t part_bytes(w, part);     bytes of a part: 0: the part must be absent; below 0: the part may be absent
//   float value(w, row, column);     W[row, column] in float32, in the order of operations of the format's own library
//   bool runs(w);                    whether decode32 decodes this weight
//   void decode32(w, row, column, float* out);   writes the values of 32 columns from a multiple of 32 on
//
// `value` defines the format, on the CPU and on CUDA; decode32 gives the same bits, on the CPU, in plain loops that the
// compiler vectorizes.
//
// A format of 4-bit codes whose values are table16()[code] * scale + add, with a scale and an addend for kScaleColumns
// columns (16 or 32), may also have members that the products of few tokens read, see packed/cpu/nibble_kernels.h:
//
//   constexpr Nibbles kNibbles;      the order of the codes
//   constexpr bool kContiguous;      whether the codes of a row follow one another without gaps
//   constexpr bool kAdds;            whether there are addends
//   constexpr int kScaleColumns;
//   const float* table16();
//   const uint8_t* codes32(w, row, column);      the 16 bytes of 32 columns
//   void affine(w, row, column, count, float* scale, float* add);   the scales of `count` blocks from `column` on; the
//                                                                   addends too if kAdds
//
// This file is included after the target pragma of an instruction set.
#pragma once

#include "weight/formats/fp4.h"
#include "weight/formats/fp8.h"
#include "weight/formats/mxfp4.h"
#include "weight/formats/nvfp4.h"

#define PEFT_EXT_FORMATS(FORMAT) \
  FORMAT(1, Fp4)                 \
  FORMAT(2, Mxfp4)               \
  FORMAT(3, Nvfp4)               \
  FORMAT(4, Fp8)
