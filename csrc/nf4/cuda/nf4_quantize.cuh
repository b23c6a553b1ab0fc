// NF4 quantize: s_b = max |w_i| over block b, q_i = #{thresholds < w_i · (1 / max(s_b, 1e-38))}, and s_b is stored. A
// tail block, which has fewer than blocksize elements, differs: its values are divided by max(s_b, 1e-38), and
// max(s_b, 1e-38) is stored.
// The input w [n] is flat and has dtype float32, bfloat16 or float16. The results are `packed` [ceil(n/2)] in uint8,
// where the high nibble is the even element (if n is odd, w is padded with a zero), and `absmax` [ceil(n/blocksize)] in
// float32. blocksize is a power of two from 32 to 4096. A thread block quantizes 8192 elements, which are whole NF4
// blocks except at the end of w; a warp quantizes 1024 of these elements. In each step lane l loads the l-th of the
// next 32 groups of 16 bytes of w. The elements stay in registers between the maximum and the codes, so that w is read
// once (at the end of w twice). Magnitudes are compared by their bits without the sign, as integers. Compared in this
// way, a NaN is above infinity, so that the maximum of a block with a NaN is NaN, as in torch.amax. The lanes of an NF4
// block combine their maxima by shuffles. If an NF4 block has more than 1024 elements, the block's warps combine their
// maxima in shared memory: 8 words, one barrier. After the maxima, lane l computes the reciprocal of the maximum of the
// warp's l-th NF4 block and stores this maximum (adjacent lanes write adjacent words), and other lanes read the
// reciprocal by a shuffle. The range [-1, 1] is divided into 31 bins: value v is in bin rint(15 v), and each bin has at
// most one threshold. Lane l holds the threshold in the bin whose number is l modulo 32, and the number of thresholds
// below this bin. Therefore two shuffles and one comparison find the exact code, also for a value that equals a
// threshold. The arithmetic is float32; the reciprocal of the maximum, and the product of w_i and this reciprocal, are
// each rounded once. A NaN has code 15, as in the reference. Bytes moved: n·sizeof(T) + n/2 + 4n/blocksize.
#pragma once

#include <math.h>

#include "cuda/ptx.cuh"
#include "nf4/nf4_code.h"
#include "weight/nf4_layout.h"

namespace peft_ext {

constexpr int kQuantizeWarps = 8;  // number of warps per thread block
constexpr int kQuantizeThreads = kQuantizeWarps * kWarpSize;
constexpr int kQuantizeTile = 1024;  // number of elements that a warp quantizes
constexpr int kQuantizeBlockTile = kQuantizeWarps * kQuantizeTile;
constexpr int kQuantizeBlocksPerMultiprocessor = 4;

// ---- codes

// The values that lane l holds for bin l (0 to 15) or bin l - 32 (negative bins).
struct Nf4Bins {
  float threshold[kWarpSize];  // threshold within the bin; 2, which is above every value, if the bin has no threshold
  uint32_t below[kWarpSize];   // number of thresholds below each lane's bin
};

constexpr int nf4_bin(float value) { return static_cast<int>(15.0f * value + 15.5f) - 15; }

constexpr Nf4Bins nf4_bins() {
  Nf4Bins bins{};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    bins.threshold[lane] = 2.0f;
    for (int i = 0; i < 15; ++i) {
      const int bin = lane < 16 ? lane : lane - kWarpSize;
      if (nf4_bin(nf4_threshold(i)) == bin) bins.threshold[lane] = nf4_threshold(i);
      if (nf4_bin(nf4_threshold(i)) < bin) ++bins.below[lane];
    }
  }
  return bins;
}

// Returns whether no two thresholds share a bin, and no threshold is so close to a bin's edge that rounding could move
// the threshold to another bin.
constexpr bool nf4_bins_hold_one_threshold() {
  for (int i = 0; i < 15; ++i) {
    if (i > 0 && nf4_bin(nf4_threshold(i)) == nf4_bin(nf4_threshold(i - 1))) return false;
    if (nf4_bin(nf4_threshold(i) - 1e-4f) != nf4_bin(nf4_threshold(i) + 1e-4f)) return false;
  }
  return true;
}
static_assert(nf4_bins_hold_one_threshold(), "the bins are too wide, or an edge meets a threshold");

__device__ const Nf4Bins kNf4DeviceBins = nf4_bins();

__device__ __forceinline__ uint32_t float_as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

__device__ __forceinline__ float bits_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Appends the code of `scaled`, which is the number of thresholds below `scaled`, to `codes` as the lowest nibble.
// `scaled` may lie outside of [-1, 1] by a few ulp. All lanes of a warp must call nf4_append_code. `threshold` and
// `below` are kNf4DeviceBins.threshold[lane] and kNf4DeviceBins.below[lane] of the calling lane.
__device__ __forceinline__ uint32_t nf4_append_code(uint32_t codes, float scaled, float threshold, uint32_t below) {
  scaled = fminf(scaled, 1.0f);  // a NaN becomes 1, which has code 15, the code of a NaN
  // Neighbouring floats near 1.5 · 2^23 differ by one, so that the sum is rounded to an integer. The low bits of the
  // sum are 15 · scaled, rounded, in two's complement.
  const int bin = static_cast<int>(float_as_bits(fma_rn(scaled, 15.0f, 12582912.0f)));
  codes = (codes << 4) + shuffle(below, bin);
  // Adds the sign bit of threshold - scaled, because a comparison would need one more select instruction.
  return codes + (float_as_bits(fadd_rn(shuffle(threshold, bin), -scaled)) >> 31);
}

// ---- maximum

__device__ __forceinline__ uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Reads the one or two elements of w that a 32-bit word holds. magnitude(word) has the bits of the largest |w| of the
// word at the top; the bits below them do not change the order of two different magnitudes.
template <typename T>
struct QuantizeWord {
  static constexpr int kSize = 2;
  __device__ static __forceinline__ uint32_t magnitude(uint32_t word) { return max_u32(word << 1, word << 17); }
  __device__ static __forceinline__ float absmax(uint32_t magnitude) { return unpack2<T>(magnitude >> 17).x; }
  __device__ static __forceinline__ void values(uint32_t word, float* out) {
    const float2 pair = unpack2<T>(word);
    out[0] = pair.x;
    out[1] = pair.y;
  }
  __device__ static __forceinline__ uint32_t bits(T value) { return value.bits; }
};

template <>
struct QuantizeWord<float> {
  static constexpr int kSize = 1;
  __device__ static __forceinline__ uint32_t magnitude(uint32_t word) { return word << 1; }
  __device__ static __forceinline__ float absmax(uint32_t magnitude) { return bits_as_float(magnitude >> 1); }
  __device__ static __forceinline__ void values(uint32_t word, float* out) { out[0] = bits_as_float(word); }
  __device__ static __forceinline__ uint32_t bits(float value) { return float_as_bits(value); }
};

// The integer type that holds the codes of one lane's 16 bytes of w.
template <typename T>
struct QuantizeCodes {
  using Type = uint32_t;
};
template <>
struct QuantizeCodes<float> {
  using Type = uint16_t;
};

__device__ __forceinline__ float at_least_smallest(float absmax) {
  return absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax;  // a NaN in absmax stays a NaN
}

// Loads 16 bytes of the input w into four words. If kWhole is false, only the first `left` elements exist, and the
// other elements are set to zero.
template <typename T, bool kWhole>
__device__ __forceinline__ void quantize_load(const T* w, int left, uint32_t (&words)[4]) {
  using Word = QuantizeWord<T>;
  if (kWhole) {
    const uint4 loaded = load_streaming(reinterpret_cast<const uint4*>(w));
    words[0] = loaded.x;
    words[1] = loaded.y;
    words[2] = loaded.z;
    words[3] = loaded.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = 0;
#pragma unroll
      for (int j = 0; j < Word::kSize; ++j) {
        const int element = i * Word::kSize + j;
        if (element < left) words[i] |= Word::bits(w[element]) << (16 * j);
      }
    }
  }
}

// Quantizes a thread block's tile, which starts at element `first` and of which `left` elements lie in w. If kWhole is
// true, all elements of the tile lie in w. If kWhole is false, every access is checked, and the values of a tail block
// are divided instead of multiplied.
template <typename T, bool kWhole>
__device__ __forceinline__ void nf4_quantize_tile(const T* w, int64_t first, int left, int log2_blocksize,
                                                  uint8_t* packed, float* absmax,
                                                  uint32_t (&warp_magnitudes)[kQuantizeWarps]) {
  using Word = QuantizeWord<T>;
  using Codes = typename QuantizeCodes<T>::Type;
  constexpr int kSize = 4 * Word::kSize;      // number of elements in a lane's 16 bytes
  constexpr int kStride = kWarpSize * kSize;  // number of elements that a warp loads in a step
  constexpr int kSteps = kQuantizeTile / kStride;

  const int blocksize = 1 << log2_blocksize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int mine = warp * kQuantizeTile + lane * kSize;  // offset of this lane's first element in the tile
  w += first + mine;
  uint32_t words[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    quantize_load<T, kWhole>(w + step * kStride, left - mine - step * kStride, words[step]);
  }
  const float threshold = kNf4DeviceBins.threshold[lane];
  const uint32_t below = kNf4DeviceBins.below[lane];

  uint32_t magnitudes[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    magnitudes[step] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) magnitudes[step] = max_u32(magnitudes[step], Word::magnitude(words[step][i]));
  }
  // Combines the maxima of the steps of one NF4 block first, because combining steps of the same lane needs no shuffle.
#pragma unroll
  for (int apart = 1; apart < kSteps; apart *= 2) {
    if (apart * kStride < blocksize) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if ((step & apart) == 0) {
          magnitudes[step] = max_u32(magnitudes[step], magnitudes[step + apart]);
          magnitudes[step + apart] = magnitudes[step];
        }
      }
    }
  }
#pragma unroll
  for (int apart = 1; apart < kWarpSize; apart *= 2) {
    if (apart * kSize < blocksize) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        magnitudes[step] = max_u32(magnitudes[step], shuffle_xor(magnitudes[step], apart));
      }
    }
  }
  if (blocksize > kQuantizeTile) {
    if (lane == 0) warp_magnitudes[warp] = magnitudes[0];
    sync_threads();
    const int warps = blocksize / kQuantizeTile;
#pragma unroll 1
    for (int i = 0; i < warps; ++i) {
      magnitudes[0] = max_u32(magnitudes[0], warp_magnitudes[warp / warps * warps + i]);
    }
#pragma unroll
    for (int step = 1; step < kSteps; ++step) magnitudes[step] = magnitudes[0];
  }

  // Lane l computes the scale of the l-th NF4 block of this warp's elements. If the warp has fewer NF4 blocks than
  // lanes, the other lanes store nothing.
  const int start = lane << log2_blocksize;
  uint32_t magnitude = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t found = shuffle(magnitudes[step], start / kSize);
    if (start / kStride == step) magnitude = found;
  }
  const float largest = Word::absmax(magnitude);
  const float divisor = at_least_smallest(largest);
  const float inverse = 1.0f / divisor;
  const int own = warp * kQuantizeTile + start;
  if (start < kQuantizeTile && (own & (blocksize - 1)) == 0 && (kWhole || own < left)) {
    absmax[(first >> log2_blocksize) + (own >> log2_blocksize)] = !kWhole && own + blocksize > left ? divisor : largest;
  }

  packed += (first + mine) / 2;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int block = (lane * kSize + step * kStride) >> log2_blocksize;
    const float step_inverse = shuffle(inverse, block);
    const float step_divisor = kWhole ? 1.0f : shuffle(divisor, block);
    const int element = mine + step * kStride;
    const bool tail = !kWhole && (element | (blocksize - 1)) >= left;
    // If kWhole is false, at the end of w, the elements are loaded again, because there are not enough registers for
    // both the elements and the checks.
    if (!kWhole) quantize_load<T, kWhole>(w + step * kStride, left - element, words[step]);
    uint32_t codes = 0;
    float values[kSize];
#pragma unroll
    for (int i = 0; i < 4; ++i) Word::values(words[step][i], values + i * Word::kSize);
#pragma unroll
    for (int nibble = kSize - 1; nibble >= 0; --nibble) {
      const int i = nibble ^ 1;  // the high nibble holds the code of the even element
      float scaled = fmul_rn(values[i], step_inverse);
      if (tail) scaled = values[i] / step_divisor;
      if (!kWhole && element + i >= left) scaled = 0.0f;  // if the number of elements is odd, w is padded with a zero
      codes = nf4_append_code(codes, scaled, threshold, below);
    }
    uint8_t* to = packed + step * kStride / 2;
    if (kWhole) {
      *reinterpret_cast<Codes*>(to) = static_cast<Codes>(codes);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; i += 2) {
        if (element + i < left) to[i / 2] = static_cast<uint8_t>(codes >> (4 * i));
      }
    }
  }
}

// Grid: ceil(numel / kQuantizeBlockTile) blocks of kQuantizeThreads. w is aligned to 16 bytes, and packed is aligned to
// 4 bytes.
template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads, kQuantizeBlocksPerMultiprocessor)
    nf4_quantize_kernel(const T* w, int64_t numel, int log2_blocksize, uint8_t* packed, float* absmax) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(uint32_t[kQuantizeWarps], warp_magnitudes);
  // All threads of a thread block take the same branch, so that all threads reach the shuffles and the barrier.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQuantizeBlockTile;
  if (first + kQuantizeBlockTile <= numel) {
    nf4_quantize_tile<T, true>(w, first, kQuantizeBlockTile, log2_blocksize, packed, absmax, warp_magnitudes);
  } else {
    nf4_quantize_tile<T, false>(w, first, static_cast<int>(numel - first), log2_blocksize, packed, absmax,
                                warp_magnitudes);
  }
}

// ---- the scales of a double-quantized weight

// a_c = max |x_i| over group c of 256,  q_i = #{thresholds < x_i · (1 / max(a_c, 1e-38))},  thresholds halfway between
// the values of `code` [256], ascending. x [n] float32 -> codes [n] uint8, absmax [ceil(n/256)] float32, not clamped.
// A warp of nf4_quantize_absmax_kernel encodes a group of 256 scales, 8 scales per lane. The thresholds take 1 KiB of
// shared memory and are searched by bisection. Bank conflicts of this search hardly matter, because there is at most
// one scale for 32 weights. A scale that is NaN gets code 255.
// Bytes moved: 5n + 4n/256, and the table once per thread block.

// Grid: ceil(numel / (kQuantizeWarps · kNestedBlock)) blocks of kQuantizeThreads. x is aligned to 16 bytes, and codes
// is aligned to 4 bytes.
static __global__ void __launch_bounds__(kQuantizeThreads)
    nf4_quantize_absmax_kernel(const float* x, const float* code, int64_t numel, uint8_t* codes, float* absmax) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(float[kNestedCodes - 1], thresholds);
  static_assert(kQuantizeThreads >= kNestedCodes - 1, "a thread makes a threshold");
  if (threadIdx.x < kNestedCodes - 1) {
    thresholds[threadIdx.x] = fmul_rn(fadd_rn(code[threadIdx.x], code[threadIdx.x + 1]), 0.5f);
  }
  sync_threads();

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kQuantizeWarps + warp;
  const bool whole = (group + 1) * kNestedBlock <= numel;
  constexpr int kSteps = kNestedBlock / (4 * kWarpSize);
  const int64_t mine = group * kNestedBlock + 4 * lane;
  float values[kSteps][4];
  uint32_t magnitude = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t element = mine + step * 4 * kWarpSize;
    if (whole) {
      const float4 loaded = load_streaming(reinterpret_cast<const float4*>(x + element));
      values[step][0] = loaded.x;
      values[step][1] = loaded.y;
      values[step][2] = loaded.z;
      values[step][3] = loaded.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[step][i] = element + i < numel ? x[element + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      magnitude = max_u32(magnitude, QuantizeWord<float>::magnitude(float_as_bits(values[step][i])));
    }
  }
#pragma unroll
  for (int apart = 1; apart < kWarpSize; apart *= 2) magnitude = max_u32(magnitude, shuffle_xor(magnitude, apart));
  const float largest = QuantizeWord<float>::absmax(magnitude);
  const float inverse = 1.0f / at_least_smallest(largest);

#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t element = mine + step * 4 * kWarpSize;
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled = fmul_rn(values[step][i], inverse);
      uint32_t below = 0;
#pragma unroll
      for (int half = kNestedCodes / 2; half > 0; half /= 2) {
        below += thresholds[below + half - 1] >= scaled ? 0 : half;
      }
      found |= below << (8 * i);
    }
    if (whole) {
      *reinterpret_cast<uint32_t*>(codes + element) = found;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (element + i < numel) codes[element + i] = static_cast<uint8_t>(found >> (8 * i));
      }
    }
  }
  if (lane == 0 && group * kNestedBlock < numel) absmax[group] = largest;
}

}  // namespace peft_ext
