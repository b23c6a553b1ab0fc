// Opens NVIDIA's driver and PyTorch's CUDA library at run time, and loads and launches kernels. See driver.h.
#include "cuda/driver.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "common/api.h"

namespace peft_ext {
namespace {

// --- the driver

using Result = int;  // CUresult
constexpr Result kSuccess = 0;
constexpr Result kOutOfMemory = 2;
constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
constexpr int kMaxDynamicShared = 8;     // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kRelaxedCapture = 2;       // CU_STREAM_CAPTURE_MODE_RELAXED

struct Driver {
  Result (*init)(unsigned flags);
  Result (*get_error_string)(Result, const char**);
  Result (*device_get)(int* device, int ordinal);
  Result (*device_get_attribute)(int* value, int attribute, int device);
  Result (*context_get)(void** context);
  Result (*context_set)(void* context);
  Result (*primary_context)(void** context, int device);
  Result (*stream_query)(void* stream);
  Result (*stream_is_capturing)(void* stream, int* status);
  Result (*exchange_capture_mode)(int* mode);
  Result (*module_load)(void** module, const void* code);
  Result (*module_unload)(void* module);
  Result (*module_get_function)(void** function, void* module, const char* name);
  Result (*function_set_attribute)(void* function, int attribute, int value);
  Result (*launch_kernel)(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                          void** extra);
};

template <typename Function>
void find(void* library, const char* library_name, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  STD_TORCH_CHECK(
      function != nullptr, "peft_ext: ", library_name, " has no function ", name,
      ". CUDA kernels need an NVIDIA driver of torch's CUDA release and a CUDA build of torch 2.11 or later");
}

Driver open_driver() {
  constexpr const char* kName = "libcuda.so.1";
  void* library = dlopen(kName, RTLD_NOW | RTLD_LOCAL);
  STD_TORCH_CHECK(library != nullptr, "peft_ext: NVIDIA's driver can't be opened: ", dlerror());
  Driver driver;
  find(library, kName, "cuInit", driver.init);
  find(library, kName, "cuGetErrorString", driver.get_error_string);
  find(library, kName, "cuDeviceGet", driver.device_get);
  find(library, kName, "cuDeviceGetAttribute", driver.device_get_attribute);
  find(library, kName, "cuCtxGetCurrent", driver.context_get);
  find(library, kName, "cuCtxSetCurrent", driver.context_set);
  find(library, kName, "cuDevicePrimaryCtxRetain", driver.primary_context);
  find(library, kName, "cuStreamQuery", driver.stream_query);
  find(library, kName, "cuStreamIsCapturing", driver.stream_is_capturing);
  find(library, kName, "cuThreadExchangeStreamCaptureMode", driver.exchange_capture_mode);
  find(library, kName, "cuModuleLoadData", driver.module_load);
  find(library, kName, "cuModuleUnload", driver.module_unload);
  find(library, kName, "cuModuleGetFunction", driver.module_get_function);
  find(library, kName, "cuFuncSetAttribute", driver.function_set_attribute);
  find(library, kName, "cuLaunchKernel", driver.launch_kernel);
  const Result result = driver.init(0);
  STD_TORCH_CHECK(result == kSuccess, "peft_ext: NVIDIA's driver does not start: error ", result);
  return driver;
}

const Driver& driver() {
  static const Driver opened = open_driver();  // if open_driver raises an error, the next call tries again
  return opened;
}

const char* described(Result result) {
  const char* text = nullptr;
  driver().get_error_string(result, &text);
  return text == nullptr ? "unknown error" : text;
}

// Raises an error unless the driver's call succeeded. The errors are worded like PyTorch's own: trainers search for
// "CUDA error" if a GPU is lost, and for "out of memory." if memory is missing.
void check(Result result, const char* what, const char* kernel) {
  STD_TORCH_CHECK(result != kOutOfMemory, "CUDA out of memory. peft_ext: ", what, " of ", kernel);
  STD_TORCH_CHECK(result == kSuccess, "CUDA error: ", described(result), " (peft_ext: ", what, " of ", kernel, ")");
}

// --- machine code

std::atomic<PeftExtImageSource> image_source{nullptr};

// Returns the C++ expression that names the kernel for NVRTC: namespace, name and template arguments.
std::string expression(const Kernel& kernel) {
  // A '*' before the mangled name means internal linkage.
  const char* mangled = kernel.local_class + (kernel.local_class[0] == '*');
  int status = 0;
  char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  STD_TORCH_CHECK(text != nullptr, "peft_ext: a kernel has an unreadable name: ", mangled);
  std::string name = text;
  free(text);
  // The demangled name is "void peft_ext::name<arguments>(parameters)::Here": the kernel's parameters are in the last
  // pair of parentheses.
  size_t end = name.rfind(')'), open = 1;
  while (open > 0 && end-- > 0) open += (name[end] == ')') - (name[end] == '(');
  name.resize(end);
  return name.rfind("void ", 0) == 0 ? name.substr(5) : name;
}

// Sets the thread's capture mode to relaxed for the lifetime of the object. In the modes "global" and "thread local",
// the driver may refuse to load machine code while a CUDA graph is captured.
struct RelaxedCapture {
  RelaxedCapture() { driver().exchange_capture_mode(&mode); }
  ~RelaxedCapture() { driver().exchange_capture_mode(&mode); }
  int mode = kRelaxedCapture;
};

// Returns the device's primary context, which PyTorch uses. The primary context is retained at the first call for a
// device, and never released.
void* primary_context(int device) {
  static std::atomic<void*> held[kMaxDevices];
  void* context = held[device].load(std::memory_order_acquire);
  if (context != nullptr) return context;
  int number = 0;
  check(driver().device_get(&number, device), "context", "a GPU");
  check(driver().primary_context(&context, number), "context", "a GPU");
  held[device].store(context, std::memory_order_release);
  return context;
}

// Makes the device's primary context the thread's context for the lifetime of the object. If the thread had no context
// before (the thread has not called the CUDA runtime yet), the thread keeps the primary context. If the thread had
// another context, for example of another library, the destructor restores this context.
class PrimaryContext {
 public:
  explicit PrimaryContext(int device) {
    STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "peft_ext: GPU number ", device, ", wanted less than ",
                    kMaxDevices);
    void *own = nullptr, *primary = primary_context(device);
    check(driver().context_get(&own), "context", "a GPU");
    if (own == primary) return;
    check(driver().context_set(primary), "context", "a GPU");
    before_ = own;
  }
  ~PrimaryContext() {
    if (before_ != nullptr) driver().context_set(before_);
  }
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

 private:
  void* before_ = nullptr;
};

// Returns the kernel's CUfunction on a device. handle_of holds no mutex while Python code compiles the kernel: a thread
// that holds Python's GIL could wait for that mutex, and this thread for the GIL. If two threads load a kernel at once,
// the first handle is kept.
void* handle_of(const Kernel& kernel, int device) {
  std::atomic<void*>& held = kernel.handles[device];
  if (void* handle = held.load(std::memory_order_acquire)) return handle;
  const std::string name = expression(kernel);
  const PeftExtImageSource source = image_source.load();
  STD_TORCH_CHECK(source != nullptr, "peft_ext: no machine code of ", name, ": Python's part is not loaded");
  PeftExtImage image{};
  source(name.c_str(), kernel.file, compute_capability(device), &image);
  STD_TORCH_CHECK(image.error == nullptr, "peft_ext: no machine code of ", name, ": ", image.error);
  const RelaxedCapture relaxed;
  void *module = nullptr, *handle = nullptr, *before = nullptr;
  check(driver().module_load(&module, image.data), "loading", name.c_str());
  // The driver may load the machine code lazily. module_get_function makes the driver load the code before the launch,
  // where loading would fail during the capture of a CUDA graph.
  check(driver().module_get_function(&handle, module, image.symbol), "loading", name.c_str());
  if (held.compare_exchange_strong(before, handle, std::memory_order_acq_rel)) return handle;
  driver().module_unload(module);
  return before;
}

// Raises the handle's limit of dynamic shared memory to at least `bytes`, because the driver's default limit is 48 KiB.
// The limit of a handle, which all threads share, is never lowered: another thread may be about to launch the kernel
// with more bytes.
void allow_shared(const Kernel& kernel, int device, void* handle, int bytes) {
  static std::mutex raising;
  std::atomic<int>& allowed = kernel.allowed[device];
  if (allowed.load(std::memory_order_acquire) >= bytes) return;
  const std::lock_guard<std::mutex> lock(raising);
  if (allowed.load(std::memory_order_relaxed) >= bytes) return;
  const Result result = driver().function_set_attribute(handle, kMaxDynamicShared, bytes);
  if (result != kSuccess) check(result, "shared memory", expression(kernel).c_str());
  allowed.store(bytes, std::memory_order_release);
}

Kernel*& first_kernel() {
  static Kernel* first = nullptr;
  return first;
}

// An entry of the list of kernels that Python reads. If Kernel objects have equal names (a kernel with internal
// linkage, launched from several source files), the list has one of these objects.
struct Listed {
  const Kernel* kernel;
  std::string name;
};

const std::vector<Listed>& listed() {
  static const std::vector<Listed> all = [] {
    std::vector<Listed> found;
    for (const Kernel* kernel = first_kernel(); kernel != nullptr; kernel = kernel->next) {
      std::string name = expression(*kernel);
      bool known = false;
      for (const Listed& other : found) known |= other.name == name;
      if (!known) found.push_back({kernel, std::move(name)});
    }
    return found;
  }();
  return all;
}

const Listed& listed(int kernel) { return listed().at(static_cast<size_t>(kernel)); }

}  // namespace

Kernel::Kernel(const char* local_class, const char* file) : local_class(local_class), file(file), next(first_kernel()) {
  first_kernel() = this;
}

const TorchCuda& torch_cuda() {
  static const TorchCuda found = [] {
    constexpr const char* kName = "libtorch_cuda.so";
    void* library = dlopen(kName, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    STD_TORCH_CHECK(library != nullptr, "peft_ext: PyTorch has not loaded ", kName, ": it is not a CUDA build");
    TorchCuda torch;
    find(library, kName, "aoti_torch_get_current_cuda_stream", torch.get_current_cuda_stream);
    find(library, kName, "aoti_torch_cuda_mm_out", torch.mm_out);
    find(library, kName, "aoti_torch_cuda_addmm_out", torch.addmm_out);
    return torch;
  }();
  return found;
}

int compute_capability(int device) {
  int number = 0, major = 0, minor = 0;
  check(driver().device_get(&number, device), "compute capability", "a GPU");
  check(driver().device_get_attribute(&major, kMajor, number), "compute capability", "a GPU");
  check(driver().device_get_attribute(&minor, kMinor, number), "compute capability", "a GPU");
  return 10 * major + minor;
}

const char* device_fault() {
  // device_fault takes error 214 (an uncorrectable memory error) and the errors 700 to 799 (most are faults of kernels)
  // for errors after which every later call of the driver fails. Without the relaxed capture mode, stream_query would
  // invalidate a CUDA graph that another thread or stream is capturing. Even in the relaxed mode, stream_query of the
  // legacy default stream (null) would invalidate the capture of a blocking stream (PyTorch's own streams are
  // non-blocking). If a blocking stream is being captured, stream_is_capturing(null) returns an error and leaves the
  // capture valid, as NVIDIA documents.
  const RelaxedCapture while_asking;
  int status = 0;
  Result result = driver().stream_is_capturing(nullptr, &status);
  if (result == kSuccess) result = driver().stream_query(nullptr);
  return result == 214 || (result >= 700 && result < 800) ? described(result) : "";
}

void launch_kernel(const Kernel& kernel, int device, const Grid& grid, const Block& block, void* stream,
                   void** parameters) {
  const PrimaryContext entered(device);
  void* handle = handle_of(kernel, device);
  const auto shared = static_cast<unsigned>(block.dynamic_shared);
  if (block.dynamic_shared > 0) allow_shared(kernel, device, handle, static_cast<int>(shared));
  const Result result = driver().launch_kernel(handle, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                                               static_cast<unsigned>(grid.z), static_cast<unsigned>(block.threads), 1,
                                               1, shared, stream, parameters, nullptr);
  if (result != kSuccess) check(result, "launch", expression(kernel).c_str());
}

}  // namespace peft_ext

int peft_ext_kernel_count() { return static_cast<int>(peft_ext::listed().size()); }
const char* peft_ext_kernel_name(int kernel) { return peft_ext::listed(kernel).name.c_str(); }
const char* peft_ext_kernel_file(int kernel) { return peft_ext::listed(kernel).kernel->file; }
void peft_ext_set_image_source(PeftExtImageSource source) { peft_ext::image_source.store(source); }
