// Functions that load and store eight consecutive elements of any type as floats. Elementwise kernels read and write
// memory in such groups of eight.
#pragma once

#include "cuda/philox.cuh"

namespace peft_ext {

constexpr int kVector = 8;

__device__ __forceinline__ int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Tells a load or a store whether the data is read again soon. Data with kStreaming leaves the caches first.
enum class Reuse { kSoon, kStreaming };

template <Reuse kReuse, typename Words>
__device__ __forceinline__ Words load_words(const Words* from) {
  if constexpr (kReuse == Reuse::kStreaming) return load_streaming(from);
  return *from;
}

template <Reuse kReuse, typename Words>
__device__ __forceinline__ void store_words(Words* to, Words words) {
  if constexpr (kReuse == Reuse::kStreaming) {
    store_streaming(to, words);
  } else {
    *to = words;
  }
}

// Converts eight elements of a 16-bit type to floats.
template <typename T>
__device__ __forceinline__ void unpack_eight(uint4 words, float (&values)[kVector]) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<T>(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// Loads eight elements from an address that is aligned to 16 bytes.
template <Reuse kReuse = Reuse::kSoon, typename T>
__device__ __forceinline__ void load_vector(const T* from, float (&values)[kVector]) {
  if constexpr (sizeof(T) == 4) {
    const float4 low = load_words<kReuse>(reinterpret_cast<const float4*>(from));
    const float4 high = load_words<kReuse>(reinterpret_cast<const float4*>(from + 4));
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  } else {
    unpack_eight<T>(load_words<kReuse>(reinterpret_cast<const uint4*>(from)), values);
  }
}

__device__ __forceinline__ float load_value(const float* from) { return *from; }
__device__ __forceinline__ float load_value(const bf16* from) { return unpack2<bf16>(from->bits).x; }
__device__ __forceinline__ float load_value(const f16* from) { return unpack2<f16>(from->bits).x; }

__device__ __forceinline__ void store_value(float* to, float value) { *to = value; }

template <typename T>
__device__ __forceinline__ void store_value(T* to, float value) {
  to->bits = static_cast<uint16_t>(pack2<T>(value, 0.0f));
}

// Loads one element whose type is known only at run time.
__device__ __forceinline__ float load_value(const void* from, DType type, int64_t at) {
  if (type == DType::kBF16) return load_value(static_cast<const bf16*>(from) + at);
  if (type == DType::kF16) return load_value(static_cast<const f16*>(from) + at);
  return static_cast<const float*>(from)[at];
}

__device__ __forceinline__ void store_value(void* to, DType type, int64_t at, float value) {
  if (type == DType::kBF16) return store_value(static_cast<bf16*>(to) + at, value);
  if (type == DType::kF16) return store_value(static_cast<f16*>(to) + at, value);
  static_cast<float*>(to)[at] = value;
}

// Returns the value rounded to T.
template <typename T>
__device__ __forceinline__ float rounded_to(float value) {
  return unpack2<T>(pack2<T>(value, 0.0f)).x;
}
template <>
__device__ __forceinline__ float rounded_to<float>(float value) {
  return value;
}

template <Reuse kReuse = Reuse::kSoon, typename T>
__device__ __forceinline__ void save_vector(T* to, const float (&values)[kVector]) {
  if constexpr (sizeof(T) == 4) {
    store_words<kReuse>(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
    store_words<kReuse>(reinterpret_cast<float4*>(to) + 1, make_float4(values[4], values[5], values[6], values[7]));
  } else {
    store_words<kReuse>(reinterpret_cast<uint4*>(to),
                        make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                                   pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7])));
  }
}

// Stores eight values, with 0 in the place of each value whose mask bit is 0. Bits 15 and 31 of masks[i] are the mask
// bits of values 2i and 2i + 1.
template <typename T>
__device__ __forceinline__ void save_masked(T* to, const float (&values)[kVector], const uint32_t (&masks)[4]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(
      pack2<T>(values[0], values[1]) & spread_signs(masks[0]), pack2<T>(values[2], values[3]) & spread_signs(masks[1]),
      pack2<T>(values[4], values[5]) & spread_signs(masks[2]), pack2<T>(values[6], values[7]) & spread_signs(masks[3]));
}

__device__ __forceinline__ void save_masked(float* to, const float (&values)[kVector], const uint32_t (&masks)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    reinterpret_cast<uint4*>(to)[i] =
        make_uint4(__float_as_uint(values[4 * i]) & spread_sign<false>(masks[2 * i]),
                   __float_as_uint(values[4 * i + 1]) & spread_sign<true>(masks[2 * i]),
                   __float_as_uint(values[4 * i + 2]) & spread_sign<false>(masks[2 * i + 1]),
                   __float_as_uint(values[4 * i + 3]) & spread_sign<true>(masks[2 * i + 1]));
}

// Loads the columns [column, column + 8) of a row with `columns` columns. `whole` tells that `columns` is a multiple of
// 8 and the row is aligned to 16 bytes, so that all eight columns exist. Columns beyond the end of the row load as 0,
// and save_columns does not store them.
template <Reuse kReuse = Reuse::kSoon, typename T>
__device__ __forceinline__ void load_columns(const T* row, int64_t column, int64_t columns, bool whole,
                                             float (&values)[kVector]) {
  if (whole) return load_vector<kReuse>(row + column, values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = column + i < columns ? load_value(row + column + i) : 0.0f;
}

// Loads columns of the row that starts at element `row`, for an element type that is known only at run time.
__device__ __forceinline__ void load_columns(const void* from, DType type, int64_t row, int64_t column, int64_t columns,
                                             bool whole, float (&values)[kVector]) {
  if (type == DType::kBF16) return load_columns(static_cast<const bf16*>(from) + row, column, columns, whole, values);
  if (type == DType::kF16) return load_columns(static_cast<const f16*>(from) + row, column, columns, whole, values);
  load_columns(static_cast<const float*>(from) + row, column, columns, whole, values);
}

template <Reuse kReuse = Reuse::kSoon, typename T>
__device__ __forceinline__ void save_columns(T* row, int64_t column, int64_t columns, bool whole,
                                             const float (&values)[kVector]) {
  if (whole) return save_vector<kReuse>(row + column, values);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (column + i < columns) store_value(row + column + i, values[i]);
}

// Bit i (0 to 7) of the result tells whether dropout keeps flat element first + i. `whole` tells that `first` is a
// multiple of 8, so that the eight elements share one Philox counter.
__device__ __forceinline__ uint32_t kept_elements(const Philox& philox, uint64_t first, bool whole) {
  const uint64_t group = first / kPhiloxGroup;
  const uint32_t kept = kept_of_group(philox, group);
  if (whole) return kept;
  return ((kept | kept_of_group(philox, group + 1) << kPhiloxGroup) >> (first % kPhiloxGroup)) & 0xffu;
}

}  // namespace peft_ext
