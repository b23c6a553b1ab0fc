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
// A format whose words hold codes of one column and several rows may also have
//
//   constexpr bool kRowBlocks = true;
//   void decode_rows(w, row, rows, column, float* out, stride);   decode32 of up to 16 rows
//
// A format of e4m3 codes has `constexpr bool kE4m3 = true`, codes(w, row, column) and scale(w, row, column), where a
// scale is one for the 32 columns from a multiple of 32 on.
//
// A format whose part 0 does not hold the codes of W row by row has `constexpr bool kRowMajor = false`.
//
// A format of 4-bit codes, where kScaleColumns columns (16 or 32) share a scale, may also have members by which codes
// are looked up in tables, see packed/cpu/lookup_avx512.h.
//
//   constexpr Nibbles kNibbles;      the order of the codes
//   constexpr int kScaleColumns;
//   bool has_nibbles(w);             whether these members are of this weight
//   const uint8_t* codes32(w, row, column);      the 16 bytes of 32 columns
//   void entries(w, row, column, float* out);    the values of the 16 codes in kScaleColumns columns from `column` on
//
// The products of few tokens, see packed/cpu/few_tokens_kernels.h, read the formats by steps of their own. The step of
// formats where a value is table16()[code] * scale reads these members:
//
//   constexpr bool kContiguous;      whether the codes of a row follow one another without gaps
//   const float* table16();
//   void scales(w, row, column, count, float* scale);   the scales of `count` blocks of kScaleColumns from `column` on
//
// This file is included after the target pragma of an instruction set.
#pragma once

#include "weight/formats/awq.h"
#include "weight/formats/fp4.h"
#include "weight/formats/fp8.h"
#include "weight/formats/gguf.h"
#include "weight/formats/gptq.h"
#include "weight/formats/hqq.h"
#include "weight/formats/int_rows.h"
#include "weight/formats/mxfp4.h"
#include "weight/formats/nvfp4.h"

#define PEFT_EXT_FORMATS(FORMAT) \
  FORMAT(1, Fp4)                 \
  FORMAT(2, Mxfp4)               \
  FORMAT(3, Nvfp4)               \
  FORMAT(4, Fp8)                 \
  FORMAT(5, IntRows)             \
  FORMAT(6, Gptq)                \
  FORMAT(7, Awq)                 \
  FORMAT(8, Hqq)                 \
  PEFT_EXT_GGUF_FORMATS(FORMAT)

// The number of a GGUF type's format is 64 + the number of the type in ggml.
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
  FORMAT(99, GgufTQ2_0)               \
  FORMAT(103, GgufMXFP4)
