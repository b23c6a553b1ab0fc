// Decodes packed weights in the formats of weight/formats/list.h:
//
//   out[n, k] = round(W[n, k] [· g[n]]),  W[n, k] = Format::value(n, k) in float32
//
// out is T [N, K], or [E, N, K] for E weights whose parts follow one another. A thread block of 8 warps decodes 8 rows,
// one row per warp, and 4 · 32 groups of 16 bytes of each row. In each step lane l decodes the l-th of 32 adjacent
// groups (8 columns; 4 of float32), so that a store of a warp is 512 contiguous bytes. Formats that store W transposed
// have the codes of adjacent rows in one word or in one sector: the 8 warps of a thread block read the sector from L1.
// NVRTC makes no FMA of a product and a sum (the options below), because the order of operations in `value` defines the
// bits. The value is multiplied by g in float32, and is rounded once to T, to nearest even.
// Bytes moved: the parts, out, and 4N for g.
//
// NVRTC options: --fmad=false
#pragma once

#include "cuda/vector.cuh"
#include "weight/formats/list.h"

namespace peft_ext {

// A kernel has the number of a format as its template argument, because NVRTC takes a kernel by a name, and the
// formats' structs have internal linkage and no such names.
template <int kNumber>
struct FormatOf;
#define FORMAT(number, Format) \
  template <>                  \
  struct FormatOf<number> {    \
    using Type = Format;       \
  };
PEFT_EXT_FORMATS(FORMAT)
#undef FORMAT

// Whether a format has the function `static void value8(const PackedView& w, int64_t row, int64_t column, float
// (&out)[8])`, which gives the bits of `value` for 8 columns from a multiple of 8 on. value8 is called only if each
// part of the weight is aligned to 16 bytes and all 8 columns exist.
template <typename Format, typename = void>
constexpr bool kHasValue8 = false;
template <typename Format>
constexpr bool kHasValue8<Format, decltype(static_cast<void>(&Format::value8))> = true;

// Decodes kCount columns from `column` on, a multiple of kCount. All of these columns exist. `aligned`: whether each
// part of the weight is aligned to 16 bytes.
template <typename Format, int kCount>
__device__ __forceinline__ void decode_columns(const PackedView& weight, bool aligned, int64_t row, int64_t column,
                                               float (&values)[kCount]) {
#ifdef __CUDACC__
  __builtin_assume(row >= 0 && column >= 0);  // divisions by powers of two are shifts
#endif
  if constexpr (kHasValue8<Format> && kCount == 8) {
    if (aligned) return Format::value8(weight, row, column, values);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = Format::value(weight, row, column + i);
}

constexpr int kPackedThreads = 256;
constexpr int kPackedRows = kPackedThreads / kWarpSize;  // number of rows per thread block
constexpr int kPackedSteps = 4;                          // number of groups of 16 bytes per lane

template <typename T>
constexpr int kPackedGroup = 16 / sizeof(T);  // number of columns in 16 bytes
template <typename T>
constexpr int kPackedColumns = kPackedSteps * kWarpSize * kPackedGroup<T>;  // number of columns per thread block

struct PackedDecode {
  PackedView weight;            // the first weight
  int64_t apart[kWeightParts];  // distances between the weights' parts in bytes
  bool aligned;                 // whether each part of each weight is aligned to 16 bytes
  const float* row_scale;       // g [N], or null
};

__device__ __forceinline__ void save_group(float* to, const float (&values)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
}

template <typename T>
__device__ __forceinline__ void save_group(T* to, const float (&values)[8]) {
  save_vector(to, values);
}

// Grid: x has ceil(N / kPackedRows) · ceil(K / kPackedColumns<T>) thread blocks, along K first; y has one for each
// weight. out is aligned to 16 bytes.
template <int kNumber, typename T>
__global__ void __launch_bounds__(kPackedThreads) packed_dequantize_kernel(PackedDecode work, T* out) {
  PEFT_EXT_KERNEL;
  using Format = typename FormatOf<kNumber>::Type;
  constexpr int kGroup = kPackedGroup<T>;
  PackedView weight = work.weight;
#pragma unroll
  for (int part = 0; part < kWeightParts; ++part)
    if (weight.part[part] != nullptr)
      weight.part[part] = static_cast<const uint8_t*>(weight.part[part]) + blockIdx.y * work.apart[part];
  const auto across = static_cast<uint32_t>((weight.columns + kPackedColumns<T> - 1) / kPackedColumns<T>);
  const int64_t row = static_cast<int64_t>(blockIdx.x / across) * kPackedRows + threadIdx.x / kWarpSize;
  if (row >= weight.rows) return;
  const float g = work.row_scale == nullptr ? 1.0f : work.row_scale[row];  // a product by 1 is exact
  T* to = out + (blockIdx.y * weight.rows + row) * weight.columns;
  int64_t column = static_cast<int64_t>(blockIdx.x % across) * kPackedColumns<T> + threadIdx.x % kWarpSize * kGroup;
  const bool whole = weight.columns % kGroup == 0;
#pragma unroll
  for (int step = 0; step < kPackedSteps; ++step, column += kWarpSize * kGroup) {
    if (column + kGroup <= weight.columns) {
      float values[kGroup];
      decode_columns<Format>(weight, work.aligned, row, column, values);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) values[i] = fmul_rn(values[i], g);
      if (whole) {
        save_group(to + column, values);  // a plain store, because a matrix product reads the weight next
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) store_value(to + column + i, values[i]);
      }
    } else {
#pragma unroll 1
      for (int64_t k = column; k < weight.columns; ++k) store_value(to + k, fmul_rn(Format::value(weight, row, k), g));
    }
  }
}

}  // namespace peft_ext
