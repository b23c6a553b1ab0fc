// Checks of tensors for the CUDA operators. See tensor.cuh.
#include "cuda/tensor.cuh"

#include <string>

namespace peft_ext {

void check_device() {
  const char* lost = lost_device();
  STD_TORCH_CHECK(lost[0] == 0, "CUDA error: ", lost, " (of a kernel before this call)");
}

void raise_reason(const std::string& text) {
  if (text.find(" API call failed at ") == std::string::npos) return;
  const std::string message = shim_message();
  check_device();
  if (message.empty()) {
    // torch before 2.13 has no function that returns the message of the error. The calls in the list below only
    // allocate and copy tensors, so that a failed call means a lack of memory.
    for (const char* call : {"aten::contiguous", "aten::clone", "aten::to", "aten::empty_like", "aten::new_empty"})
      STD_TORCH_CHECK(text.find(call) == std::string::npos, "CUDA out of memory. peft_ext: ", text);
    return;
  }
  // Trainers search for "out of memory.", which the messages of some allocators do not contain.
  const bool lacks = tells_no_memory(message) && message.find("out of memory.") == std::string::npos;
  STD_TORCH_CHECK(false, lacks ? "CUDA out of memory. " : "", message, " (in a call of peft_ext)");
}

std::vector<int64_t> shape_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return shape;
}

void check_kernel_dtype(const char* op, const char* argument, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ",
                  argument, " is ", torch::headeronly::toString(type), ", wanted Float, BFloat16 or Half");
}

void check_same_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like,
                       const char* name) {
  STD_TORCH_CHECK(same_device(tensor, like), op, ": ", argument, " is on another device than ", name,
                  ", wanted cuda:", like.get_device_index());
}

void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType type, int64_t elements,
                  const Tensor& like, const char* name) {
  check_same_device(op, argument, tensor, like, name);
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == elements, op, ": ", argument, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), " with ", tensor.numel(), " elements, wanted ",
                  torch::headeronly::toString(type), " with ", elements);
}

void check_matrix(const char* op, const char* argument, const Tensor& matrix, const Tensor& like) {
  check_same_device(op, argument, matrix, like);
  check_kernel_dtype(op, argument, matrix.scalar_type());
}

Tensor device_vector(const char* op, const char* argument, const Tensor& vector, int64_t size, const Tensor& like) {
  check_same_device(op, argument, vector, like);
  STD_TORCH_CHECK(vector.numel() == size, op, ": ", argument, " has ", vector.numel(), " elements, wanted ", size);
  return as_type(as_contiguous(vector), ScalarType::Float);
}

std::optional<Tensor> device_seed(const char* op, double dropout_p, const std::optional<Tensor>& seed,
                                  const Tensor& like) {
  if (!seed.has_value()) return std::nullopt;
  if (!on_host(*seed)) check_same_device(op, "seed", *seed, like);
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 2, op, ": seed is ",
                  torch::headeronly::toString(seed->scalar_type()), " with ", seed->numel(),
                  " elements, wanted Long with 2");
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, ": dropout_p is ", dropout_p, ", wanted 0 <= p < 1");
  return as_contiguous(*seed);
}

}  // namespace peft_ext
