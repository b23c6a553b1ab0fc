// The formats of packed weights. FORMAT(number, struct): `number` is the format's number in the operator's argument
// `layout` and in peft_ext/weights/; 0 is NF4, which csrc/nf4 decodes. Each struct has
//
//   static float value(const PackedView& w, int64_t row, int64_t column);
//
// the value W[row, column] in float32, in the order of operations of the format's own library. It runs on the CPU and
// on CUDA.
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
