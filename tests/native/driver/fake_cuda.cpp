// A stand-in for NVIDIA's driver, libcuda.so.1: it runs nothing, keeps a log of the calls, and fails where it is told
// to. "Machine code" is the text "code of <symbol>".
#include <stdio.h>
#include <string.h>

#include <map>
#include <mutex>
#include <string>

namespace {

std::mutex mutex;
std::string calls, failing;
std::map<void*, int> limits;  // most bytes of dynamic shared memory of a launch, by function; default: 48 KiB
int capture_mode = 0;  // CU_STREAM_CAPTURE_MODE_GLOBAL
thread_local void* context = nullptr;
bool blocking = false, invalidated = false;  // whether a blocking stream is being captured, and its capture's fate

int call(const std::string& name, const std::string& text, int error) {
  const std::lock_guard<std::mutex> lock(mutex);
  calls += name + text + "\n";
  return failing == name ? error : 0;
}

}  // namespace

extern "C" {

void fake_fail(const char* function) { failing = function; }
const char* fake_calls() {
  static std::string told;
  told.swap(calls);
  calls.clear();
  return told.c_str();
}

// Gives the thread a context that is the primary context of no device.
void fake_context(int number) { context = reinterpret_cast<void*>(0x2000 + number); }
void fake_blocking_capture(int on) { blocking = on, invalidated = false; }
int fake_invalidated() { return invalidated; }

int cuInit(unsigned) { return call("init", "", 100); }
int cuGetErrorString(int error, const char** text) {
  *text = error == 2 ? "out of memory" : error == 200 ? "device kernel image is invalid" : "unspecified launch failure";
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 - device : attribute == 76 ? 0 : -1;
  return 0;
}
int cuCtxGetCurrent(void** found) {
  *found = context;
  return 0;
}
int cuCtxSetCurrent(void* set) {
  context = set;
  char text[40];
  snprintf(text, sizeof(text), " %p", set);
  return call("current", text, 1);
}
int cuDevicePrimaryCtxRetain(void** found, int device) {
  *found = reinterpret_cast<void*>(0x1000 + device);
  return call("context", " of " + std::to_string(device), 2);
}
// If cuStreamQuery is called in another capture mode than the relaxed one (2), NVIDIA's driver invalidates a CUDA graph
// that is being captured.
int cuStreamQuery(void*) {
  call("query", " in mode " + std::to_string(capture_mode), 0);
  if (blocking) {
    invalidated = true;
    return 906;
  }
  return failing == "stream" ? 719 : failing == "capture" ? 906 : 600;
}
// While a blocking stream is being captured, returns for the legacy default stream an error that leaves the capture
// valid.
int cuStreamIsCapturing(void* stream, int* status) {
  *status = 0;
  return stream == nullptr && blocking ? 906 : 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
int cuModuleLoadData(void** module, const void* code) {
  const char* text = static_cast<const char*>(code);
  if (context == nullptr) return 201;
  if (strncmp(text, "code of ", 8) != 0) return 200;
  *module = strdup(text + 8);
  return 0;
}
int cuModuleUnload(void*) { return call("unload", "", 0); }
// cuModuleGetFunction loads the machine code, as the driver does by default.
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module;
  if (strcmp(static_cast<const char*>(module), name) != 0) return 500;
  return call("load", std::string(" ") + name + " in mode " + std::to_string(capture_mode), 2);
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  char text[200];
  snprintf(text, sizeof(text), " %d = %d of %s", attribute, value, static_cast<char*>(function));
  {
    const std::lock_guard<std::mutex> lock(mutex);
    limits[function] = value;
  }
  return call("attribute", text, 1);
}
int cuLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  if (context != reinterpret_cast<void*>(0x1000) && context != reinterpret_cast<void*>(0x1001)) return 201;
  char text[300];
  snprintf(text, sizeof(text), " %s grid %u %u %u block %u %u %u shared %u stream %p first %lld last %d extra %p",
           static_cast<char*>(kernel), gx, gy, gz, bx, by, bz, shared, stream, *static_cast<long long*>(parameters[0]),
           *static_cast<int*>(parameters[1]), extra);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto limit = limits.find(kernel);
    if (shared > static_cast<unsigned>(limit == limits.end() ? 49152 : limit->second)) return 1;
  }
  return call("launch", text, 719);
}

}  // extern "C"
