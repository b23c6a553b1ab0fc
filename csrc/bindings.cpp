// Defines the pybind11 module _C: the functions of common/api.h for Python, and a comparison of Python objects. This
// file includes no torch headers, and the native library must be loaded before the module. With pybind11 2.13 or later,
// the module declares that its functions may run on several threads at a time, so that a free-threaded Python does not
// turn its global lock on.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
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

// Whether each change gives a dictionary a number that no dictionary had before (PEP 509), so that a dictionary with
// its old number is unchanged. In Python 3.13, a change of an attribute gives the object's dictionary no new number.
#define PEFT_EXT_DICTS_ARE_NUMBERED (PY_VERSION_HEX < 0x030D0000)

// Facts about Python objects: each dictionary in `places` has, under its name in `names`, its object in `values` (None
// also stands for a missing name), each dictionary in `empty` is empty, each list in `lists` equals its list in
// `items`, and each object in `objects` has its class in `kinds`.
class Facts {
 public:
  Facts(py::tuple places, py::tuple names, py::tuple values, py::tuple empty, py::tuple lists, py::tuple items,
        py::tuple objects, py::tuple kinds)
      : places_(std::move(places)),
        names_(std::move(names)),
        values_(std::move(values)),
        empty_(std::move(empty)),
        lists_(std::move(lists)),
        items_(std::move(items)),
        objects_(std::move(objects)),
        kinds_(std::move(kinds)) {
    if (names_.size() != places_.size() || values_.size() != places_.size() || items_.size() != lists_.size() ||
        kinds_.size() != objects_.size())
      throw py::value_error("Facts: two tuples whose items belong together have different lengths");
    for (const py::tuple& dicts : {places_, empty_})
      for (const py::handle dict : dicts) {
        if (!PyDict_Check(dict.ptr())) throw py::type_error("Facts: an item of places or empty is no dict");
#if PEFT_EXT_DICTS_ARE_NUMBERED
        versions_.emplace_back(dict.ptr(), 0);
#endif
      }
    for (const py::tuple& held : {lists_, items_})
      for (const py::handle list : held)
        if (!PyList_Check(list.ptr())) throw py::type_error("Facts: an item of lists or items is no list");
#if PEFT_EXT_DICTS_ARE_NUMBERED
    std::sort(versions_.begin(), versions_.end());
    versions_.erase(std::unique(versions_.begin(), versions_.end()), versions_.end());
#endif
  }

  // Returns whether the facts hold.
  bool hold() {
    if (!dictionaries_hold()) return false;
    for (Py_ssize_t i = 0, count = size_of(objects_); i < count; ++i) {
      read_ahead(objects_, i);
      if (reinterpret_cast<PyObject*>(Py_TYPE(item_of(objects_, i))) != item_of(kinds_, i)) return false;
    }
    for (Py_ssize_t i = 0, count = size_of(lists_); i < count; ++i) {
      read_ahead(lists_, i);
      const int same = PyObject_RichCompareBool(item_of(lists_, i), item_of(items_, i), Py_EQ);
      if (same < 0) throw py::error_already_set();
      if (same == 0) return false;
    }
    return true;
  }

 private:
  // `hold` prefetches the object that is kAhead items, and the table of the dictionary that is kTablesAhead items,
  // after the compared item. In generation, reading the model's weights has displaced most of these objects from the
  // cache.
  static constexpr Py_ssize_t kAhead = 16, kTablesAhead = 8;

  static PyObject* item_of(const py::tuple& tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }
  static Py_ssize_t size_of(const py::tuple& tuple) { return PyTuple_GET_SIZE(tuple.ptr()); }

  static void read_ahead(const py::tuple& objects, Py_ssize_t i) {
    if (i + kAhead < size_of(objects)) __builtin_prefetch(item_of(objects, i + kAhead));
  }

#if PEFT_EXT_DICTS_ARE_NUMBERED
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  static uint64_t version_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#pragma GCC diagnostic pop

  bool are_unchanged() const {
    for (size_t i = 0; i < versions_.size(); ++i) {
      if (i + kAhead < versions_.size()) __builtin_prefetch(versions_[i + kAhead].first);
      if (version_of(versions_[i].first) != versions_[i].second) return false;
    }
    return true;
  }

  bool dictionaries_hold() {
    if (are_unchanged()) return true;
    std::vector<std::pair<PyObject*, uint64_t>> versions = versions_;
    for (auto& [dict, version] : versions) version = version_of(dict);
    if (!items_hold()) return false;
    versions_ = std::move(versions);
    return true;
  }

  // Each dictionary in places_ and empty_ once, with its number when the facts last held; no number is 0.
  std::vector<std::pair<PyObject*, uint64_t>> versions_;
#else
  bool dictionaries_hold() const { return items_hold(); }
#endif

  bool items_hold() const {
    for (Py_ssize_t i = 0, count = size_of(places_); i < count; ++i) {
      read_ahead(places_, i);
      if (i + kTablesAhead < count)
        __builtin_prefetch(reinterpret_cast<PyDictObject*>(item_of(places_, i + kTablesAhead))->ma_keys);
      PyObject* found = PyDict_GetItemWithError(item_of(places_, i), item_of(names_, i));
      if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if ((found == nullptr ? Py_None : found) != item_of(values_, i)) return false;
    }
    for (Py_ssize_t i = 0, count = size_of(empty_); i < count; ++i) {
      read_ahead(empty_, i);
      if (PyDict_GET_SIZE(item_of(empty_, i)) > 0) return false;
    }
    return true;
  }

  py::tuple places_, names_, values_, empty_, lists_, items_, objects_, kinds_;
};

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
  py::class_<Facts>(
      m, "Facts",
      "Each dict in places has its object in values under its name in names (None: or lacks the name), each dict in "
      "empty is empty, each list in lists equals its list in items, and each object has its class in kinds.")
      .def(py::init<py::tuple, py::tuple, py::tuple, py::tuple, py::tuple, py::tuple, py::tuple, py::tuple>(),
           py::arg("places"), py::arg("names"), py::arg("values"), py::arg("empty"), py::arg("lists"), py::arg("items"),
           py::arg("objects"), py::arg("kinds"))
      .def("hold", &Facts::hold, "Whether all facts hold.");
  m.def("kernels", &kernels, "The CUDA kernels: the C++ expression that names an instance, and the source it is in.");
  m.def("sources", &sources, "The texts of the CUDA kernels' sources, by path.");
  m.def("set_image_source", &set_image_source, py::arg("function"),
        "Set the function (kernel, file, capability) -> (symbol, machine code as bytes).");
  m.def("register_operators", &peft_ext_register_operators, py::arg("key"), py::arg("namespace"),
        "Register the operators' functions for a dispatch key, CPU or CUDA, in a namespace of torch.ops.");
}
