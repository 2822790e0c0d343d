// What the glue of Adam and of SGD share: checks of scalars and lists, where a scalar is read, and
// the batches that become launches.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "optim/flat_tensors.h"
#include "optim/optim.h"
#include "optim/optim_ops.h"

namespace fused {

// Tensors of one dtype on one device.
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

  // Where a tensor's first element is, as T on the device; nullptr without a tensor.
  template <typename T>
  const T* pointer(const std::optional<at::Tensor>& maybe_tensor) {
    if (!maybe_tensor) return nullptr;
    keep_.push_back(
        maybe_tensor->detach().to(device_, c10::CppTypeToScalarType<T>::value, true).contiguous());
    return keep_.back().template const_data_ptr<T>();
  }

 private:
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

void check_length(const char* op, const char* argument, size_t got, size_t length);
void check_scalar(const char* op, const char* argument, const std::optional<at::Tensor>& tensor);
void check_step(const char* op, const at::Tensor& step, const at::Tensor& param, bool capturable);

// Throws unless a kernel can update `param` by `grad`.
void check_param(const char* op, const at::Tensor& param, const at::Tensor& grad);

// Throws where one memory location holds several elements, which cannot all be written.
void check_writable(const char* op, const char* argument, const at::Tensor& tensor);

// Throws unless everything but the step counts fits together: parameters, gradients, `num_states`
// states by these names, masters, averages, options.
void check_step_tensors(const char* op, const StepTensors& tensors, const StepOptions& options,
                        const char* const* state_names, size_t num_states);

// The lists of a registered op as a step has them. `scales`: see adam_op.
StepTensors listed_tensors(const char* op, at::TensorList params, at::TensorList grads,
                           std::initializer_list<at::TensorList> states, at::TensorList scales,
                           at::TensorList masters, at::TensorList emas, at::TensorList steps);

// What becomes one launch of a kernel, as far as every rule has it.
struct LaunchBatch {
  at::Tensor example;
  std::vector<OptimTensor> tensors;
  StateType state_type;
  MasterType master;
  bool has_ema;

  OptimCommon common(const char* op, const StepOptions& options, ScalarReader& read) const;
};

// Flattens the tensors of a step into batches; `flat` owns what had to be copied.
std::vector<LaunchBatch> make_batches(FlatTensors& flat, const StepTensors& tensors,
                                      const StepOptions& options);

// Whether two of the tensors share memory, so that the order of their updates matters.
bool share_memory(at::TensorList tensors);

void clear_gradients(const TensorVector& grads);

// Runs a step that was checked: run(tensors, options) for all at once where no two parameters or
// written gradients share memory (one listed twice, overlapping views), else for one after the
// other.
template <typename Options, typename Run>
void run_in_order(const StepTensors& tensors, const Options& options, const Run& run) {
  const StepOptions& common = options.common;
  if (!share_memory(tensors.params) && !(common.zero_grad && share_memory(tensors.grads))) {
    return run(tensors, options);
  }
  Options one_by_one = options;
  one_by_one.common.zero_grad = false;
  for (size_t i = 0; i < tensors.params.size(); ++i) run(tensors.at(i), one_by_one);
  if (common.zero_grad) clear_gradients(tensors.grads);
}

}  // namespace fused
