// Allocates a tensor, tries to allocate tensors that PyTorch refuses, and prints each error. The program of
// test_allocation.py.
#include <cstdio>
#include <exception>

#include "cpu/tensor.h"

using namespace peft_ext;

namespace {

template <typename F>
void print_error(const char* name, F f) {
  try {
    f();
    std::printf("%s: no error\n", name);
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

}  // namespace

int main() {
  print_error("none", [] { empty({3, 4}, ScalarType::Half); });
  print_error("negative", [] { empty({5, -3}, ScalarType::Float); });
  print_error("overflow", [] { empty({int64_t{1} << 40, int64_t{1} << 40}, ScalarType::Float); });
  print_error("memory", [] { empty({int64_t{1} << 55}, ScalarType::Float); });
  print_error("no such device", [] {
    const int64_t bytes = checked_bytes({5}, ScalarType::Double);
    if (try_empty(aoti_torch_device_type_cuda(), 0, {5}, ScalarType::Double).has_value()) return;
    check_no_memory(shim_message(), bytes);
    std::printf("an old torch without messages, ");
  });
  return 0;
}
