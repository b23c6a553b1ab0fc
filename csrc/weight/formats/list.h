// The formats of packed weights. FORMAT(number, struct): `number` is the format's number in the operator's argument
// `layout` and in peft_ext/weights/; 0 is NF4, which csrc/nf4 decodes. Each struct has
//
//   static float value(const PackedView& w, int64_t row, int64_t column);
//
// the value W[row, column] in float32, in the order of operations of the format's own library. It runs on the CPU and
// on CUDA.
#pragma once

#include "weight/formats/awq.h"
#include "weight/formats/gptq.h"
#include "weight/formats/hqq.h"
#include "weight/formats/int_rows.h"
#include "weight/formats/mxfp4.h"

#define PEFT_EXT_FORMATS(FORMAT) \
  FORMAT(2, Mxfp4) FORMAT(5, IntRows) FORMAT(6, Gptq) FORMAT(7, Awq) FORMAT(8, Hqq)
