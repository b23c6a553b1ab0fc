// The matrix instructions, on the registers of a whole warp. The layouts of fragments are in cuda/ptx.cuh. A sum runs
// in float32 from C over k = 0..15 and is rounded at each step. The product of two 16-bit values is exact in float32,
// except for tiny bfloat16 products. With exact products an FMA makes no difference, and the bits are equal on every
// host. Hardware adds in another order: tests compare with hardware only within tolerances.
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
  multiply(c, a, b);
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
