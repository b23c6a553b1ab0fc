// The emulator's mma and ldmatrix, for a whole warp. The layouts of the fragments are described in cuda/ptx.cuh. mma
// adds the products in one of two modes, which the environment variable PEFT_EXT_EMULATED_SUMS chooses for the process.
//
// In the mode "rounded", the default, a sum runs in float32 from C over k = 0..15 and is rounded at each step. The
// product of two 16-bit values is exact in float32, except for bfloat16 products that are too small or too large for
// float32. For an exact product an FMA gives the same bits as a product and a sum, so that the bits are equal on every
// host.
//
// In the mode "truncated", the functions add as the tensor cores of an A100 were observed to add (Fasi, Higham,
// Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021). The A100 has
// the lowest compute capability (8.0) that the CUDA kernels support. C and eight exact products are aligned to the
// largest exponent among them, truncated to 24 bits behind the bit of that exponent, and added. The sum is truncated to
// float32, and is the C of the next eight products.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/dtype.h"
#include "emulator/machine.h"

namespace peft_ext {
namespace emulator {
namespace {

#if defined(__x86_64__) && defined(__linux__)
#define PEFT_EXT_CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define PEFT_EXT_CLONES
#endif

PEFT_EXT_CLONES void multiply(float (&c)[16][8], const float (&a)[16][16], const float (&b)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int column = 0; column < 8; ++column) sum[column] = c[row][column];
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) c[row][column] = sum[column];
  }
}

constexpr int kAddedAtOnce = 8;      // number of products that are aligned and added in one step
constexpr int kKeptBits = 23 + 1;    // number of bits of a term behind the bit of the largest exponent
constexpr int kNoExponent = -10000;  // stands for the exponent of zero, and is below the exponent of every float

// Returns sum · 2^last, truncated to float32; infinity if the value is too large for float32.
float cut_off_to_float(int64_t sum, int last) {
  if (sum == 0) return 0.0f;
  const double value = ldexp(static_cast<double>(sum), last);
  const int exponent = ilogb(value);
  if (exponent > 127) return value > 0 ? INFINITY : -INFINITY;
  const int kept = (exponent < -126 ? -126 : exponent) - 23;
  return static_cast<float>(ldexp(trunc(ldexp(value, -kept)), kept));
}

// Returns c + a[0] b[0] + ... + a[7] b[7], truncated as on an A100 (the mode "truncated" of this file). The exponent of
// a product counts as the sum of its factors' exponents, although the product may have the next higher exponent.
float truncated_sum(float c, const float* a, const float* b) {
  bool finite = isfinite(c);
  for (int k = 0; k < kAddedAtOnce; ++k) finite = finite && isfinite(a[k]) && isfinite(b[k]);
  if (!finite) {
    for (int k = 0; k < kAddedAtOnce; ++k) c += a[k] * b[k];
    return c;
  }
  int largest = c == 0.0f ? kNoExponent : ilogb(c);
  for (int k = 0; k < kAddedAtOnce; ++k) {
    if (a[k] == 0.0f || b[k] == 0.0f) continue;
    const int exponent = ilogb(a[k]) + ilogb(b[k]);
    if (exponent > largest) largest = exponent;
  }
  if (largest == kNoExponent) return 0.0f;
  const double unit = ldexp(1.0, kKeptBits - largest);
  int64_t sum = static_cast<int64_t>(c * unit);  // the conversion to an integer cuts the fraction off
  for (int k = 0; k < kAddedAtOnce; ++k) sum += static_cast<int64_t>(static_cast<double>(a[k]) * b[k] * unit);
  return cut_off_to_float(sum, largest - kKeptBits);
}

void multiply_truncated(float (&c)[16][8], const float (&a)[16][16], const float (&b)[16][8]) {
  float columns[8][16];
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < 8; ++column) columns[column][k] = b[k][column];
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < 16; k += kAddedAtOnce) {
        c[row][column] = truncated_sum(c[row][column], a[row] + k, columns[column] + k);
      }
    }
  }
}

bool sums_are_truncated() {
  static const bool truncated = [] {
    const char* named = getenv("PEFT_EXT_EMULATED_SUMS");
    if (named == nullptr || strcmp(named, "rounded") == 0) return false;
    if (strcmp(named, "truncated") == 0) return true;
    fprintf(stderr, "PEFT_EXT_EMULATED_SUMS is '%s', and not 'rounded' or 'truncated'\n", named);
    abort();
  }();
  return truncated;
}

template <typename T>
void multiply_lanes(Fiber* lanes) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Fiber& from = lanes[lane];
    for (int i = 0; i < 4; ++i) {
      float* to = &a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
      to[0] = to_float(T{static_cast<uint16_t>(from.a[i])});
      to[1] = to_float(T{static_cast<uint16_t>(from.a[i] >> 16)});
      c[g + 8 * (i / 2)][2 * t + i % 2] = from.c[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = to_float(T{static_cast<uint16_t>(from.b[i])});
      b[2 * t + 8 * i + 1][g] = to_float(T{static_cast<uint16_t>(from.b[i] >> 16)});
    }
  }
  sums_are_truncated() ? multiply_truncated(c, a, b) : multiply(c, a, b);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) lanes[lane].c[i] = c[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

}  // namespace

void multiply_bf16(Fiber* lanes) { multiply_lanes<bf16>(lanes); }
void multiply_f16(Fiber* lanes) { multiply_lanes<f16>(lanes); }

void load_matrices(Fiber* lanes, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) memcpy(values[row], lanes[8 * matrix + row].row, 16);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = transposed ? values[2 * t][g] : values[g][2 * t];
      const uint16_t high = transposed ? values[2 * t + 1][g] : values[g][2 * t + 1];
      lanes[lane].matrices[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace emulator
}  // namespace peft_ext
