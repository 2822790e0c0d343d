// What the glue of Adam and of SGD share: checks of scalars and lists, where a scalar is read, and
// the batches that become launches.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "optim/optim.h"

namespace fused {

// Tensors of one dtype on one device: what one launch works on.
template <typename Tensor>
struct Batch {
  at::Tensor example;
  std::vector<Tensor> tensors;
};

template <typename Tensor>
Batch<Tensor>& batch_of(std::vector<Batch<Tensor>>& batches, const at::Tensor& param) {
  for (Batch<Tensor>& batch : batches) {
    if (batch.example.scalar_type() == param.scalar_type() &&
        batch.example.device() == param.device()) {
      return batch;
    }
  }
  return batches.emplace_back(Batch<Tensor>{param, {}});
}

// The scalar tensors of a step as the kernels for one device read them.
class ScalarReader {
 public:
  ScalarReader(at::Device device, bool capturable) : device_(device), capturable_(capturable) {}

  OptimScalar operator()(double value, const std::optional<at::Tensor>& maybe_tensor);
  OptimGradients gradients(const std::optional<at::Tensor>& grad_scale,
                           const std::optional<at::Tensor>& found_inf, bool maximize);

 private:
  const float* float_pointer(const std::optional<at::Tensor>& maybe_tensor);

  at::Device device_;
  bool capturable_;
  std::vector<at::Tensor> keep_;  // what was converted, until the launch is made
};

// Whether kernels read this scalar (a step count or a hyperparameter) from their own device's
// memory. The emulator's device memory is the host's, so there `capturable` alone tells.
inline bool lives_on_device(const at::Tensor& tensor, [[maybe_unused]] bool capturable) {
#if defined(FUSED_EMULATED)
  return capturable;
#else
  return !tensor.is_cpu();
#endif
}

void check_length(const char* op, const char* argument, at::TensorList list, size_t length);
void check_scalar(const char* op, const char* argument, const std::optional<at::Tensor>& tensor);
void check_step(const char* op, const at::Tensor& step, const at::Tensor& param, bool capturable);

// Throws unless a kernel can update `param` by `grad`.
void check_param(const char* op, const at::Tensor& param, const at::Tensor& grad);

// Throws unless `tensor` belongs to `param`: same shape, dtype, device, and strided.
void check_operand(const char* op, const char* argument, const at::Tensor& tensor,
                   const at::Tensor& param);

// Throws where one memory location holds several elements, which cannot all be written.
void check_writable(const char* op, const char* argument, const at::Tensor& tensor);

// Whether two of the parameters share memory, so that the order of their updates matters.
bool share_memory(at::TensorList params);

}  // namespace fused
