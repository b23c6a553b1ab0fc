// Defines the pybind11 module _C, which exposes build facts and selects the CPU path. This file includes no torch
// headers; the operators register themselves with the dispatcher when this library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = PEFT_EXT_VERSION;
  info["torch"] = PEFT_EXT_TORCH;
  info["torch_target"] = PEFT_EXT_TORCH_TARGET;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("gcc ") + __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  std::vector<std::string> compiled;
  for (int i = 0; i < peft_ext::kIsaCount; ++i)
    if (const auto isa = static_cast<peft_ext::Isa>(i); peft_ext::isa_compiled(isa))
      compiled.push_back(peft_ext::isa_name(isa));
  info["isas"] = compiled;
  info["cuda"] = PEFT_EXT_CUDA;
  return info;
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (int i = 0; i < peft_ext::kIsaCount; ++i) {
    const auto isa = static_cast<peft_ext::Isa>(i);
    if (peft_ext::isa_available(isa)) names.push_back(peft_ext::isa_name(isa));
  }
  return names;
}

void set_isa(const std::string& name) {
  for (int i = 0; i < peft_ext::kIsaCount; ++i) {
    const auto isa = static_cast<peft_ext::Isa>(i);
    if (name == peft_ext::isa_name(isa) && peft_ext::isa_available(isa)) return peft_ext::set_current_isa(isa);
  }
  throw py::value_error("set_isa: name is '" + name + "', wanted one of isas()");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and CPU path of peft_ext's native library.";
  m.def("build_info", &build_info, "What this library was built from.");
  m.def("isa", [] { return peft_ext::isa_name(peft_ext::current_isa()); }, "The CPU path in use.");
  m.def("isas", &available, "The CPU paths that this library has and this CPU supports.");
  m.def("set_isa", &set_isa, py::arg("name"), "Take a CPU path, one of isas().");
}
