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
// compiler vectorizes. This file is included after the target pragma of an instruction set.
#pragma once

#include "weight/formats/gguf.h"
#include "weight/formats/mxfp4.h"

#define PEFT_EXT_FORMATS(FORMAT) \
  FORMAT(2, Mxfp4)               \
  PEFT_EXT_GGUF_FORMATS(FORMAT)

// 64 + the number of the type in ggml.
#define PEFT_EXT_GGUF_FORMATS(FORMAT) \
  FORMAT(66, GgufQ4_0)                \
  FORMAT(67, GgufQ4_1)                \
  FORMAT(70, GgufQ5_0)                \
  FORMAT(71, GgufQ5_1)                \
  FORMAT(72, GgufQ8_0)                \
  FORMAT(74, GgufQ2_K)                \
  FORMAT(75, GgufQ3_K)                \
  FORMAT(76, GgufQ4_K)                \
  FORMAT(77, GgufQ5_K)                \
  FORMAT(78, GgufQ6_K)                \
  FORMAT(84, GgufIQ4_NL)              \
  FORMAT(87, GgufIQ4_XS)              \
  FORMAT(103, GgufMXFP4)
