// The list of the operators' functions, and their registration. See registration.h.
#include "common/registration.h"

#include <string.h>

namespace peft_ext {
namespace {

const Operators*& first_operators() {
  static const Operators* first = nullptr;
  return first;
}

}  // namespace

Operators::Operators(const char* key, Add add) : key(key), add(add), next(first_operators()) {
  first_operators() = this;
}

void register_operators(const char* key, const char* name_space) {
  using torch::stable::detail::StableLibrary;
  using torch::stable::detail::StableTorchLibraryInit;
  for (const Operators* one = first_operators(); one != nullptr; one = one->next)
    if (strcmp(one->key, key) == 0)  // never deleted: PyTorch calls the functions as long as the process lives
      new StableTorchLibraryInit(StableLibrary::Kind::IMPL, one->add, name_space, one->key, __FILE__, __LINE__);
}

}  // namespace peft_ext
