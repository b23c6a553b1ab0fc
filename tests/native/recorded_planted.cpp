// Loops whose memory accesses are known, for tests/native/test_many_cores.py. This file is compiled with
// -fsanitize=thread, like the traced library.
#include <stdint.h>

using ParallelFunc = void (*)(int64_t begin, int64_t end, void* context);
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc run, void* context);

namespace {

// Part i writes the float i, so that neighbouring parts write to the same cache line.
void write_one(int64_t begin, int64_t end, void* context) {
  for (int64_t i = begin; i < end; ++i) static_cast<volatile float*>(context)[i] = 1.0f;
}

// Part i writes 4 KiB of its own.
void write_page(int64_t begin, int64_t end, void* context) {
  for (int64_t i = 1024 * begin; i < 1024 * end; ++i) static_cast<volatile float*>(context)[i] = 1.0f;
}

// Each part reads the same 256 KiB twice, which is more than an L1 and less than an L2 holds.
void read_twice(int64_t begin, int64_t end, void* context) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t at = 0; at < 2 * 65536; ++at) (void)static_cast<volatile float*>(context)[at % 65536];
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void planted(float* data, int64_t parts) {
  torch_parallel_for(0, parts, 1, write_one, data);
  torch_parallel_for(0, parts, 1, write_page, data);
  torch_parallel_for(0, parts, 1, read_twice, data);
}
