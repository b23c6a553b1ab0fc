// Decodes packed weights in the formats of weight/formats/list.h:
//
//   out[n, k] = round(W[n, k] [· g[n]]),  W[n, k] = Format::value(n, k) in float32
//
// g is an optional scale of the rows. out has type T, and is [N, K], or [E, N, K] for a stack of E weights whose parts
// follow one another. A thread block of 8 warps decodes 8 rows, one row per warp, and 4 · 32 · 8 columns. In each step
// lane l decodes the l-th of 32 adjacent groups of 8 columns, so that a warp stores 512 contiguous bytes (1024 of
// float32). Formats that store W transposed have the codes of adjacent rows in one word or in one sector: the 8 warps
// of a thread block read the sector from L1. The option --fmad=false keeps NVRTC from contracting a product and a sum
// to an FMA, because the operations in `value` define the bits. The value is multiplied by g in float32, and is rounded
// once to T, to nearest even. Bytes moved: the parts of W, out, and, if g is given, 4 N bytes of g.
//
// NVRTC options: --fmad=false
#pragma once

#include "cuda/vector.cuh"
#include "packed/cuda/columns8.cuh"

namespace peft_ext {

// A kernel has the number of a format as its template argument, because NVRTC finds a kernel by the kernel's name, and
// the structs of the formats have internal linkage and so cannot be part of the name.
template <int kNumber>
struct FormatOf;
#define FORMAT(number, Format)   \
  template <>                    \
  struct FormatOf<number> {      \
    using Type = OnCuda<Format>; \
  };
PEFT_EXT_FORMATS(FORMAT)
#undef FORMAT

// Decodes the 8 columns from `column` on. `column` is a multiple of 8, and all 8 columns exist.
template <typename Format>
__device__ __forceinline__ void decode_columns(const PackedView& weight, int64_t row, int64_t column,
                                               float (&values)[kVector]) {
#ifdef __CUDACC__
  __builtin_assume(row >= 0 && column >= 0);  // with this assumption, divisions by powers of two become shifts
#endif
  if constexpr (kHasValue8<Format>) {
    Format::value8(weight, row, column, values);
  } else {
    one_by_one(values, [&](int k) { return Format::value(weight, row, column + k); });
  }
}

constexpr int kPackedThreads = 256;
constexpr int kPackedRows = kPackedThreads / kWarpSize;             // number of rows of W that a thread block decodes
constexpr int kPackedSteps = 4;                                     // number of groups of 8 columns that a lane decodes
constexpr int kPackedColumns = kPackedSteps * kWarpSize * kVector;  // number of columns per thread block

struct PackedDecode {
  PackedView weight;            // the first weight
  int64_t apart[kWeightParts];  // distance in bytes from each part of a weight to the next weight's part
  const float* row_scale;       // g [N], or null
};

// Grid: x has ceil(N / kPackedRows) · ceil(K / kPackedColumns) thread blocks, along K first; y has one for each
// weight. out is aligned to 16 bytes.
template <int kNumber, typename T>
__global__ void __launch_bounds__(kPackedThreads, 4) packed_dequantize_kernel(PackedDecode work, T* out) {
  PEFT_EXT_KERNEL;
  using Format = typename FormatOf<kNumber>::Type;
  PackedView weight = work.weight;
#pragma unroll
  for (int part = 0; part < kWeightParts; ++part)
    if (weight.part[part] != nullptr)
      weight.part[part] = static_cast<const uint8_t*>(weight.part[part]) + blockIdx.y * work.apart[part];
  const auto across = static_cast<uint32_t>((weight.columns + kPackedColumns - 1) / kPackedColumns);
  const int64_t row = static_cast<int64_t>(blockIdx.x / across) * kPackedRows + threadIdx.x / kWarpSize;
  if (row >= weight.rows) return;
  const float g = work.row_scale == nullptr ? 1.0f : work.row_scale[row];  // if g is 1, the product is exact
  T* to = out + (blockIdx.y * weight.rows + row) * weight.columns;
  int64_t column = static_cast<int64_t>(blockIdx.x % across) * kPackedColumns + threadIdx.x % kWarpSize * kVector;
  const bool whole = weight.columns % kVector == 0;
#pragma unroll 1
  for (int step = 0; step < kPackedSteps; ++step, column += kWarpSize * kVector) {
    if (column + kVector <= weight.columns) {
      float values[kVector];
      decode_columns<Format>(weight, row, column, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = fmul_rn(values[i], g);
      if (whole) {
        save_vector(to + column, values);  // an ordinary store leaves the weight in L2 for the next matrix product
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) store_value(to + column + i, values[i]);
      }
    } else {
#pragma unroll 1
      for (int64_t k = column; k < weight.columns; ++k) store_value(to + k, fmul_rn(Format::value(weight, row, k), g));
    }
  }
}

}  // namespace peft_ext
