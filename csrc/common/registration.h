// Registers the operators' functions with PyTorch's dispatcher. The namespace in torch.ops is an argument, because one
// process may load several copies of the library, each with its own operators.
#pragma once

#include <torch/csrc/stable/library.h>

// PEFT_EXT_OPERATORS(CPU, m) { m.impl("name", TORCH_BOX(&function)); } lists the functions of a file's operators for a
// dispatch key; register_operators() registers all listed functions.
#define PEFT_EXT_OPERATORS(key, m) PEFT_EXT_OPERATORS_(key, m, C10_UID)
#define PEFT_EXT_OPERATORS_(key, m, uid)                                                                            \
  static void C10_CONCATENATE(add_operators_, uid)(torch::stable::detail::StableLibrary&);                          \
  static const ::peft_ext::Operators C10_CONCATENATE(operators_, uid){#key, &C10_CONCATENATE(add_operators_, uid)}; \
  static void C10_CONCATENATE(add_operators_, uid)(torch::stable::detail::StableLibrary & m)

namespace peft_ext {

// The operators of one source file for one dispatch key: `add` registers their functions. All Operators objects form a
// linked list.
struct Operators {
  using Add = void (*)(torch::stable::detail::StableLibrary&);
  Operators(const char* key, Add add);

  const char* key;
  Add add;
  const Operators* next;
};

// Registers the functions of all files for a dispatch key in a namespace of torch.ops.
void register_operators(const char* key, const char* name_space);

}  // namespace peft_ext
