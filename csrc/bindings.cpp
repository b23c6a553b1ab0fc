// Defines the pybind11 module _C: the functions of common/api.h for Python, and a comparison of Python objects. This
// file includes no torch headers, and the native library must be loaded before the module. With pybind11 2.13 or later,
// the module declares that its functions may run on several threads at a time, so that a free-threaded Python does not
// turn its global lock on.
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
    // The KeyboardInterrupt caught here becomes an error text. PyErr_SetInterrupt makes Python raise a new
    // KeyboardInterrupt after the call of the operator.
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

// `holds` prefetches the object that is kAhead items, and the table of the dictionary that is kTablesAhead items, after
// the compared item. In generation, reading the model's weights has displaced most of these objects from the cache.
constexpr Py_ssize_t kAhead = 16, kTablesAhead = 8;

PyObject* item_of(const py::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); }

void read_ahead(const py::list& objects, Py_ssize_t i, Py_ssize_t count) {
  if (i + kAhead < count) __builtin_prefetch(item_of(objects, i + kAhead));
}

bool holds(const py::list& places, const py::list& names, const py::list& values, const py::list& empty,
           const py::list& modules, const py::list& kinds) {
  const auto count = static_cast<Py_ssize_t>(places.size()), others = static_cast<Py_ssize_t>(modules.size());
  if (names.size() != places.size() || values.size() != places.size() || kinds.size() != modules.size())
    throw py::value_error("holds: places, names and values, or modules and kinds, have different lengths");
  for (Py_ssize_t i = 0; i < count; ++i) {
    read_ahead(places, i, count);
    if (i + kTablesAhead < count && PyDict_Check(item_of(places, i + kTablesAhead)))
      __builtin_prefetch(reinterpret_cast<PyDictObject*>(item_of(places, i + kTablesAhead))->ma_keys);
    PyObject* const place = item_of(places, i);
    if (!PyDict_Check(place)) throw py::type_error("holds: a place is no dict");
    PyObject* found = PyDict_GetItemWithError(place, item_of(names, i));
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if ((found == nullptr ? Py_None : found) != item_of(values, i)) return false;
  }
  const auto containers = static_cast<Py_ssize_t>(empty.size());
  for (Py_ssize_t i = 0; i < containers; ++i) {
    read_ahead(empty, i, containers);
    const int is_full = PyObject_IsTrue(item_of(empty, i));
    if (is_full < 0) throw py::error_already_set();
    if (is_full > 0) return false;
  }
  for (Py_ssize_t i = 0; i < others; ++i) {
    read_ahead(modules, i, others);
    if (reinterpret_cast<PyObject*>(Py_TYPE(item_of(modules, i))) != item_of(kinds, i)) return false;
  }
  return true;
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
  m.def("forget_plan", &peft_ext_forget_plan, py::arg("plan"),
        "Forget the lists that the operator decoder_layer keeps under the number plan.");
  m.def("parallel_loops", &peft_ext_parallel_loops,
        "The number of parallel loops of CPU operators that woke other threads since the library was loaded.");
  m.def(
      "holds", &holds, py::arg("places"), py::arg("names"), py::arg("values"), py::arg("empty"), py::arg("modules"),
      py::arg("kinds"),
      "Whether each place, a dict, has the value under the name (None: or lacks the name), each container in empty is "
      "empty, and each module has the class in kinds.");
  m.def("kernels", &kernels, "The CUDA kernels: the C++ expression that names an instance, and the source it is in.");
  m.def("sources", &sources, "The texts of the CUDA kernels' sources, by path.");
  m.def("set_image_source", &set_image_source, py::arg("function"),
        "Set the function (kernel, file, capability) -> (symbol, machine code as bytes).");
  m.def("register_operators", &peft_ext_register_operators, py::arg("key"), py::arg("namespace"),
        "Register the operators' functions for a dispatch key, CPU or CUDA, in a namespace of torch.ops.");
}
