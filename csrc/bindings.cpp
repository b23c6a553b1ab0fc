// Defines the pybind11 module _C: the functions of common/api.h for Python. The module includes no torch headers, and
// the native library must be loaded before the module. The module declares that its functions may run on several
// threads at a time, so that a free-threaded Python keeps its global lock off.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/api.h"

namespace py = pybind11;

namespace {

template <typename Accept>
std::vector<std::string> paths(Accept accept) {
  std::vector<std::string> names;
  for (int isa = 0; isa < peft_ext_isa_count(); ++isa)
    if (accept(isa)) names.push_back(peft_ext_isa_name(isa));
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = peft_ext_version();
  info["torch"] = peft_ext_built_for_torch();
  info["torch_target"] = peft_ext_oldest_torch();
  info["compiler"] = peft_ext_compiler();
  info["sources"] = peft_ext_source_digest();
  info["isas"] = paths(peft_ext_isa_compiled);
  return info;
}

void set_isa(const std::string& name) {
  for (int isa = 0; isa < peft_ext_isa_count(); ++isa)
    if (name == peft_ext_isa_name(isa) && peft_ext_isa_available(isa)) return peft_ext_set_isa(isa);
  throw py::value_error("set_isa: name is '" + name + "', wanted one of isas()");
}

std::vector<std::pair<std::string, std::string>> kernels() {
  std::vector<std::pair<std::string, std::string>> found;
  for (int kernel = 0; kernel < peft_ext_kernel_count(); ++kernel)
    found.emplace_back(peft_ext_kernel_name(kernel), peft_ext_kernel_file(kernel));
  return found;
}

std::map<std::string, std::string> sources() {
  std::map<std::string, std::string> found;
  for (int source = 0; source < peft_ext_source_count(); ++source)
    found.emplace(peft_ext_source_path(source), peft_ext_source_text(source));
  return found;
}

// The Python function that returns (symbol, machine code) of a CUDA kernel. The Python function is never released: a
// thread may launch a kernel while Python shuts down.
std::atomic<PyObject*> image_function{nullptr};

void image_of(const char* name, const char* file, int capability, PeftExtImage* image) {
  static thread_local std::string symbol, data, error;
  const py::gil_scoped_acquire lock;
  try {
    const auto function = py::reinterpret_borrow<py::object>(image_function.load());
    std::tie(symbol, data) = function(name, file, capability).cast<std::pair<std::string, std::string>>();
    image->symbol = symbol.c_str();
    image->data = data.data();
  } catch (py::error_already_set& caught) {
    // PyErr_SetInterrupt makes Python raise KeyboardInterrupt again after the call of the operator.
    if (caught.matches(PyExc_KeyboardInterrupt)) PyErr_SetInterrupt();
    error = caught.what();
    image->error = error.c_str();
  } catch (const std::exception& caught) {
    error = caught.what();
    image->error = error.c_str();
  }
}

void set_image_source(py::object function) {
  image_function = function.release().ptr();
  peft_ext_set_image_source(image_of);
}

}  // namespace

#if PYBIND11_VERSION_HEX >= 0x020D0000
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
#else
PYBIND11_MODULE(_C, m) {
#endif
  m.doc() = "Build facts, CPU path, scratch memory and CUDA kernels of peft_ext's native library.";
  m.attr("_sources") = py::str(peft_ext::kSourceDigest);  // digest of _C's own sources
  m.def("build_info", &build_info, "What the native library was built from.");
  m.def("isa", [] { return peft_ext_isa_name(peft_ext_isa()); }, "The CPU path in use.");
  m.def(
      "isas", [] { return paths(peft_ext_isa_available); },
      "The CPU paths that the library has and this CPU supports.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Choose the CPU path of later calls, one of isas(). A running call keeps its path.");
  m.def("kept_scratch", &peft_ext_kept_scratch, "Bytes of scratch memory that all threads keep between calls.");
  m.def("release_scratch", &peft_ext_release_scratch, py::call_guard<py::gil_scoped_release>(),
        "Release the scratch memory of all threads that are in no operator call. Returns the number of bytes.");
  m.def("parallel_loops", &peft_ext_parallel_loops,
        "The number of parallel loops of CPU operators that woke other threads since the library was loaded.");
  m.def("kernels", &kernels, "The CUDA kernels: the C++ expression that names an instance, and the source it is in.");
  m.def("sources", &sources, "The texts of the CUDA kernels' sources, by path.");
  m.def("set_image_source", &set_image_source, py::arg("function"),
        "Set the function (kernel, file, capability) -> (symbol, machine code as bytes).");
  m.def("register_operators", &peft_ext_register_operators, py::arg("key"), py::arg("namespace"),
        "Register the operators' functions for a dispatch key, CPU or CUDA, in a namespace of torch.ops.");
}
