// One fault of each kind that the sanitizers look for. tools/sanitize.py tests first that each fault is reported.
#include <cstddef>
#include <cstdint>
#include <limits>
#include <thread>

#define PLANTED extern "C" __attribute__((visibility("default")))

// Reads one element past the end of the caller's memory.
PLANTED float planted_address(const float* values, size_t count) {
  const volatile float* read = values;
  return read[count];
}

PLANTED int32_t planted_undefined(const float*, size_t count) {
  volatile int32_t most = std::numeric_limits<int32_t>::max();
  return most + static_cast<int32_t>(count);
}

// Two threads write to one address.
PLANTED float planted_thread(float* values, size_t count) {
  const auto add = [=] {
    for (size_t i = 0; i < count; ++i) values[i] += 1.0f;
  };
  std::thread one(add), other(add);
  one.join();
  other.join();
  return values[0];
}
