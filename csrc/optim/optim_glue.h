// What the glue of Adam and of SGD share: checks of scalars and lists, where a scalar is read, and
// the batches that become launches.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "optim/flat_tensors.h"
#include "optim/kept_table.h"
#include "optim/optim.h"
#include "optim/optim_ops.h"
#include "optim/tensor_kind.h"

namespace fused {

// A scalar tensor on the device of the kernels that read it. The host waits where that is the CPU,
// which would not wait for a copy that is still under way.
inline at::Tensor brought_to(at::Device device, at::ScalarType type, const at::Tensor& scalar) {
  return scalar.detach().to(device, type, /*non_blocking=*/!device.is_cpu());
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
    constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
    keep_.push_back(brought_to(device_, type, *maybe_tensor).contiguous());
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

// Throws unless the tensors among the options are scalars and seeds.
void check_step_options(const char* op, const StepOptions& options);

// Throws unless everything but the step counts fits together: parameters, gradients, `num_states`
// states by these names, masters, averages.
void check_step_tensors(const char* op, const StepTensors& tensors, const StepOptions& options,
                        const char* const* state_names, size_t num_states);

// The lists of a registered op as a step has them. `scales`: see adam_op.
StepTensors listed_tensors(const char* op, at::TensorList params, at::TensorList grads,
                           std::initializer_list<at::TensorList> states, at::TensorList scales,
                           at::TensorList masters, at::TensorList emas, at::TensorList steps);

// What becomes one launch of a kernel, as far as every rule has it.
struct LaunchBatch {
  TensorKind kind;
  std::vector<OptimTensor> tensors;
  StateType state_type;
  MasterType master;
  bool has_ema;
  KeptTable table{};

  OptimCommon common(const char* op, const StepOptions& options, ScalarReader& read) const;
  void make_table();
};

// Flattens the tensors of a step into batches; `flat` owns what had to be copied.
std::vector<LaunchBatch> make_batches(FlatTensors& flat, const StepTensors& tensors,
                                      const StepOptions& options);

// Where something begins and ends in memory.
using MemorySpan = std::pair<const char*, const char*>;

// Whether any two overlap. Sorts them.
bool overlap(std::vector<MemorySpan>& spans);

// Whether two of the tensors share memory, so that the order of their updates matters.
bool share_memory(at::TensorList tensors);

// Whether the step is skipped, as far as the host must know: a count that it keeps may not advance
// on a step that only the device knows to be skipped. With counts on the device it does not ask.
bool host_sees_skip(const TensorVector& steps, const StepOptions& options);

void clear_gradients(const TensorVector& grads);

}  // namespace fused
