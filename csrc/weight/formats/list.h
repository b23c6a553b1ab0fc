// The list of the formats of packed weights. FORMAT(number, struct): `number` is the format's number in the operators'
// argument `layout` and in peft_ext/weights/; 0 is NF4, which csrc/nf4 decodes. Each struct has the following members,
// where w is the PackedView of a weight and W is the decoded matrix:
//
//   const char* refused(w)         returns null if w is valid, or else a text with the valid group, option or shape.
//   int64_t part_bytes(w, part)    returns the bytes of a part; negated if the part may be absent, 0 if the part must
//                                  be absent or empty.
//   float value(w, row, column)    returns W[row, column] in float32, by the operations of the format's own library.
//   bool runs(w)                   returns whether decode32 decodes the weight w.
//   void decode32(w, row, column, float* out)   writes the values of 32 columns from a multiple of 32 on.
//
// `value` defines the format, on the CPU and on CUDA; decode32 gives the same bits, on the CPU, in plain loops that the
// compiler vectorizes.
//
// A format that stores W transposed (AWQ, GPTQ) also has the following members:
//
//   constexpr bool kRowBlocks = true tells that the format has decode_rows.
//   void decode_rows(w, row, rows, column, float* out, stride) decodes 32 columns of up to 16 rows.
//
// A format of e4m3 codes has `constexpr bool kE4m3 = true`, codes(w, row, column) and scale(w, row, column), where the
// 32 columns from a multiple of 32 on share one scale.
//
// A format without decode_rows whose part 0 does not hold the codes of W row by row has `constexpr bool kRowMajor =
// false`.
//
// A format of 4-bit codes, where kScaleColumns columns (16 or 32) share a scale, may also have members by which codes
// are looked up in tables, see packed/cpu/lookup_avx512.h.
//
//   constexpr Nibbles kNibbles is the order of the codes.
//   constexpr int kScaleColumns is the number of columns that share a scale, 16 or 32.
//   bool has_nibbles(w) returns whether the codes of the weight w can be looked up by these members.
//   const uint8_t* codes32(w, row, column) returns the address of the 16 bytes with the codes of 32 columns.
//   void entries(w, row, column, float* out) writes the values that the 16 codes have in the kScaleColumns columns from
//       `column` on.
//
// The products of few tokens, see packed/cpu/few_tokens_kernels.h, read the formats by steps of their own. The step of
// formats where a value is table16()[code] * scale reads the following members:
//
//   constexpr bool kContiguous tells whether the codes of a row follow one another without gaps.
//   const float* table16() returns numbers that bfloat16 holds exactly: the values of the 16 codes without a scale,
//       or a multiple of these values.
//   void scales(w, row, column, count, float* scale) writes the scales (divided by the factor of the multiple) of
//       `count` blocks of kScaleColumns columns, from `column` on.
//
// The kernels of an instruction set include this file after the target pragma.
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
