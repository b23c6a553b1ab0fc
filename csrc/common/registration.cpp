// The list of the operators' functions, and their registration with PyTorch. See registration.h.
#include "common/registration.h"

#include <string.h>

#include "common/api.h"

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
  // The StableLibrary object is never deleted, because its destructor would remove the registrations.
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, name_space, key, __FILE__, __LINE__);
  for (const Operators* one = first_operators(); one != nullptr; one = one->next)
    if (strcmp(one->key, key) == 0) one->add(*library);
}

}  // namespace peft_ext

void peft_ext_register_operators(const char* key, const char* name_space) {
  peft_ext::register_operators(key, name_space);
}
