// NF4 dequantize:  w_i = round(code[q_i] · s_b [· g_row]),  b = i / blocksize,  s_b = absmax_b, or, double-quantized,
//                  s_b = nested_code[absmax_b] · nested_absmax[b / 256] + nested_offset.
// The input `packed` [ceil(n/2)] is uint8, where the high nibble is the even element; n is the number of elements of a
// weight of any shape. The result `out` [n] is float32, bfloat16 or float16. blocksize is a power of two >= 32, so that
// each aligned group of 32 elements has one scale.
// A warp dequantizes 1024 consecutive elements. Lane l decodes the scale of the l-th group of 32 elements. Up to 8/9 of
// the bytes that the kernel moves are output. Therefore the lanes follow the order of the output: in each step lane l
// computes the l-th of the next 32 groups of 16 bytes (8 elements; 4 of float32), so that a warp stores 512 contiguous
// bytes. A warp's loads of codes are contiguous too, 4 bytes per lane (2 for float32).
// Each lane holds one of the 16 NF4 values, and other lanes read the value by a shuffle, without bank conflicts.
// nf4_dequantize_kernel uses no shared memory.
// Each float32 product and sum is rounded, without FMA; the result is then rounded once to T, to nearest even.
// Bytes moved: n/2 + n·sizeof(T), and for the scales 4n/blocksize (double-quantized scales: n/blocksize · 1.016).
#pragma once

#include "cuda/ptx.cuh"
#include "nf4/nf4_code.h"
#include "weight/nf4_layout.h"

namespace peft_ext {

// An NF4 weight as an argument of kernels. nested_absmax, nested_code and nested_offset are null unless the scales are
// double-quantized.
struct Nf4View {
  const uint8_t* packed;  // packed codes, aligned to 4 bytes
  const void* absmax;     // float scales, or uint8_t codes of scales if nested_absmax is given
  const float* nested_absmax;
  const float* nested_code;
  const float* nested_offset;  // in device memory, because reading the offset on the host would wait for the stream
  int64_t numel;
  int log2_blocksize;
};

constexpr int kNf4Group = 32;                    // number of elements that share a scale at every blocksize
constexpr int kNf4Tile = kWarpSize * kNf4Group;  // number of elements of the weight that a warp decodes
constexpr int kNf4Warps = 8;                     // number of warps per thread block
constexpr int kNf4Threads = kNf4Warps * kWarpSize;
constexpr int kNf4BlocksPerMultiprocessor = 6;  // 6 · 256 = 1536 threads, which fit on a multiprocessor from sm_80 on
constexpr int kNf4BlockTile = kNf4Warps * kNf4Tile;

// A copy of kNf4Code that device code can index.
__device__ const float kNf4DeviceCode[16] = {
    kNf4Code[0], kNf4Code[1], kNf4Code[2],  kNf4Code[3],  kNf4Code[4],  kNf4Code[5],  kNf4Code[6],  kNf4Code[7],
    kNf4Code[8], kNf4Code[9], kNf4Code[10], kNf4Code[11], kNf4Code[12], kNf4Code[13], kNf4Code[14], kNf4Code[15],
};

__device__ __forceinline__ float nf4_scale(const Nf4View& weight, int64_t block) {
  if (weight.nested_absmax == nullptr) return static_cast<const float*>(weight.absmax)[block];
  const float code = weight.nested_code[static_cast<const uint8_t*>(weight.absmax)[block]];
  return fadd_rn(fmul_rn(code, weight.nested_absmax[block >> kLog2NestedBlock]), *weight.nested_offset);
}

// Number of elements in the 16 bytes that a lane stores at a time, and the type that holds the codes of these elements.
template <typename T>
struct Nf4Vector {
  using Codes = uint32_t;
  static constexpr int kSize = 8;
};
template <>
struct Nf4Vector<float> {
  using Codes = uint16_t;
  static constexpr int kSize = 4;
};

template <typename T>
__device__ __forceinline__ void store_vector(T* out, const float (&values)[8]) {
  *reinterpret_cast<uint4*>(out) = make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                                              pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7]));
}

__device__ __forceinline__ void store_vector(float* out, const float (&values)[4]) {
  *reinterpret_cast<float4*>(out) = make_float4(values[0], values[1], values[2], values[3]);
}

__device__ __forceinline__ void store_element(float* out, float value) { *out = value; }

template <typename T>
__device__ __forceinline__ void store_element(T* out, float value) {
  out->bits = static_cast<uint16_t>(pack2<T>(value, 0.0f));
}

// The factor of each row of the weight, and the length of a row in vectors of Nf4Vector<T>::kSize elements. A weight
// whose rows are scaled has fewer than 2^32 vectors.
struct Nf4RowScale {
  const float* scale;
  uint32_t vectors;
};

// Dequantizes this warp's part of the thread block's elements, which start at element `first`. If kWhole is true, all
// elements of the thread block lie within the weight; otherwise every access is checked. All lanes take part, with and
// without kWhole, because each lane holds an NF4 value that other lanes read.
template <typename T, bool kWhole, bool kScaled>
__device__ __forceinline__ void nf4_dequantize_tile(const Nf4View& weight, T* out, int64_t first,
                                                    const Nf4RowScale& rows) {
  using Codes = typename Nf4Vector<T>::Codes;
  constexpr int kSize = Nf4Vector<T>::kSize;
  constexpr int kSteps = kNf4Group / kSize;

  const int lane = threadIdx.x % kWarpSize;
  first += threadIdx.x / kWarpSize * kNf4Tile;
  const int64_t mine = first + lane * kSize;
  const uint8_t* packed = weight.packed + mine / 2;
  Codes codes[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint8_t* from = packed + step * kWarpSize * kSize / 2;
    if (kWhole) {
      codes[step] = load_streaming(reinterpret_cast<const Codes*>(from));
    } else {
      codes[step] = 0;
#pragma unroll
      for (int byte = 0; byte < kSize / 2; ++byte) {
        const int64_t element = mine + step * kWarpSize * kSize + 2 * byte;
        if (element < weight.numel) codes[step] |= from[byte] << (8 * byte);
      }
    }
  }

  // This barrier keeps the loads of the codes before the loads of the scales. Without the barrier the compiler would
  // first wait for a double-quantized scale, which needs two loads, one after the other. With the barrier the loads of
  // codes and scales overlap.
  __syncwarp();
  const float code = kNf4DeviceCode[lane % 16];
  const int64_t group = first + lane * kNf4Group;
  const float scale = kWhole || group < weight.numel ? nf4_scale(weight, group >> weight.log2_blocksize) : 0.0f;

#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t element = mine + step * kWarpSize * kSize;
    const float step_scale = shuffle(scale, step * kSize + lane * kSize / kNf4Group);
    float values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      // The code of element i is nibble i ^ 1 of the codes, because the high nibble of a byte is the first element. The
      // shuffle ignores the bits above the nibble.
      values[i] = fmul_rn(shuffle(code, codes[step] >> (4 * (i ^ 1)), 16), step_scale);
    }
    if constexpr (kScaled) {
      if (kWhole || element < weight.numel) {
        const float g = load_cached(rows.scale + static_cast<uint32_t>(element / kSize) / rows.vectors);
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[i] = fmul_rn(values[i], g);
      }
    }
    if (kWhole || element + kSize <= weight.numel) {
      store_vector(out + element, values);  // a plain store leaves the weight in L2 for the next product
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (element + i < weight.numel) store_element(out + element + i, values[i]);
      }
    }
  }
}

// Grid: ceil(numel / kNf4BlockTile) blocks of kNf4Threads. out is aligned to 16 bytes.
template <typename T, bool kScaled>
__global__ void __launch_bounds__(kNf4Threads, kNf4BlocksPerMultiprocessor - (kScaled ? 2 : 0))
    nf4_dequantize_kernel(Nf4View weight, T* out, Nf4RowScale rows) {
  PEFT_EXT_KERNEL;
  // All threads of a thread block take the same branch. The compiler sees that the branch is uniform, so that shuffles
  // need no re-convergence of the warp.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kNf4BlockTile;
  if (first + kNf4BlockTile <= weight.numel) {
    nf4_dequantize_tile<T, true, kScaled>(weight, out, first, rows);
  } else {
    nf4_dequantize_tile<T, false, kScaled>(weight, out, first, rows);
  }
}

}  // namespace peft_ext
