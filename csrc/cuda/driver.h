// Access to NVIDIA's driver, to functions of PyTorch's CUDA library, and to the machine code of the kernels, from the
// first call of a CUDA operator on. The host library does not link with NVIDIA's driver or PyTorch's CUDA library, and
// so can be loaded on a machine that has neither.
#pragma once

#include <stdint.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda/grid.h"
#include "cuda/kernel_name.h"

namespace peft_ext {

// The functions of PyTorch's CUDA library (libtorch_cuda) that the operators call.
struct TorchCuda {
  AOTITorchError (*get_current_cuda_stream)(int32_t device, void** stream);
  AOTITorchError (*mm_out)(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
  AOTITorchError (*addmm_out)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a, AtenTensorHandle b,
                              double beta, double alpha);
};

// Returns the functions of the CUDA library that PyTorch has loaded. Raises an error if PyTorch is not a CUDA build.
const TorchCuda& torch_cuda();

// Returns 10 · major + minor of a GPU's compute capability.
int compute_capability(int device);

// Returns "", or the driver's description of the error that an earlier kernel left on the current GPU.
const char* device_fault();

// Launches a kernel on a stream. `parameters` holds the addresses of the kernel's arguments. The first launch of a
// kernel on a device loads the kernel's machine code.
void launch_kernel(const Kernel& kernel, int device, const Grid& grid, const Block& block, void* stream,
                   void** parameters);

}  // namespace peft_ext
