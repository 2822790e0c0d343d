// The optimizer steps as functions of tensors: what pybind11 and torch.library bind.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "common/status.h"
#include "optim/optim.h"

namespace fused {

class KeptStep;  // optim/kept_step.h

using TensorVector = std::vector<at::Tensor>;

// The tensors of one step: entry i of each list belongs to parameter i. A list that the step has no
// use for is empty; an undefined tensor stands for a parameter that has none.
struct StepTensors {
  TensorVector params, grads;
  std::array<TensorVector, kMaxStates> states;  // in the parameter's dtype, float32, bfloat16, int8
  std::array<TensorVector, kMaxStates> scales;  // of int8 states: float32, one for 256 elements
  TensorVector masters;                         // float32, or int16 remainders
  TensorVector emas;                            // float32; float64 beside float64
  TensorVector steps;                           // one float32 or float64

  // Those of parameter i alone.
  StepTensors at(size_t i) const;
};

// What every step reads besides.
struct StepOptions {
  bool maximize = false;
  // Steps and tensor hyperparameters live on the parameters' device and are read there.
  bool capturable = false;
  std::optional<at::Tensor> grad_scale, found_inf;  // torch.amp.GradScaler's
  std::optional<at::Tensor> norm;                   // of the gradients, after unscaling
  std::optional<double> max_norm;                   // clips by `norm`
  bool skip_nonfinite = false;                      // changes nothing where `norm` is not finite
  bool zero_grad = false;
  double ema_decay = 0;
  std::optional<at::Tensor> rng;  // stochastic rounding: int64 [seed, offset]

  bool writes_grads() const { return grad_scale.has_value() || zero_grad; }
};

// A tensor_* that is set takes the number's place.
struct AdamOptions {
  StepOptions common;
  double lr, beta1, beta2, weight_decay, eps;
  bool amsgrad, decoupled_weight_decay;
  std::optional<at::Tensor> tensor_lr, tensor_beta1, tensor_beta2;
};

struct SgdOptions {
  StepOptions common;
  double lr, weight_decay, momentum, dampening;
  bool nesterov;
  bool first_step;  // the momentum buffers hold nothing yet
  std::optional<at::Tensor> tensor_lr;
};

// A step that only has to be made: everything is checked and every temporary allocated, and nothing
// written yet.
class ReadyStep {
 public:
  virtual ~ReadyStep() = default;
  virtual void make() = 0;  // once
};

// One step over any number of tensors, of any of the four dtypes and of several devices, in place.
// Throws for what does not fit together. `check_only` stops there. Nothing comes back where there
// is nothing to be done. The step is kept in `maybe_keep`, which must then outlive it, where the
// next one can be made of what it has gathered.
FUSED_API std::unique_ptr<ReadyStep> prepare(StepTensors tensors, const AdamOptions& options,
                                             bool check_only, KeptStep* maybe_keep);
FUSED_API std::unique_ptr<ReadyStep> prepare(StepTensors tensors, const SgdOptions& options,
                                             bool check_only, KeptStep* maybe_keep);

// The same for a kept step whose tensors are as they were, and stay so until it is made.
FUSED_API std::unique_ptr<ReadyStep> prepare(KeptStep& kept, const AdamOptions& options,
                                             bool check_only);
FUSED_API std::unique_ptr<ReadyStep> prepare(KeptStep& kept, const SgdOptions& options,
                                             bool check_only);

// Throws unless the kernels of `op` can update each parameter by its gradient.
FUSED_API void check_gradients(const char* op, at::TensorList params, at::TensorList grads);

// The Euclidean norm of all tensors together, over `grad_scale` where it is given: a float64 scalar
// on the first tensor's device (0 on the CPU without tensors), which the host does not wait for.
// Any dtypes, layouts and devices; the same bits whatever the number of threads.
FUSED_API at::Tensor total_norm(at::TensorList tensors,
                                const std::optional<at::Tensor>& grad_scale);

// Multiplies every tensor in place by min(1, max_norm / (norm + 1e-6)), as
// torch.nn.utils.clip_grad_norm_ does, without a visit of `norm` to the host.
FUSED_API void clip_by_norm_(at::TensorList tensors, const at::Tensor& norm, double max_norm);

// The same as torch.library binds them, with plain arguments. `scales` has those of the first
// states of all parameters, then those of the second and so on.
FUSED_API void adam_op(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
    at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs, at::TensorList steps,
    at::TensorList scales, at::TensorList masters, at::TensorList emas, double lr, double beta1,
    double beta2, double weight_decay, double eps, bool amsgrad, bool decoupled_weight_decay,
    const std::optional<at::Tensor>& tensor_beta1, const std::optional<at::Tensor>& tensor_beta2,
    const std::optional<at::Tensor>& tensor_lr, bool maximize, bool capturable,
    const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
    const std::optional<at::Tensor>& norm, std::optional<double> max_norm, bool skip_nonfinite,
    bool zero_grad, double ema_decay, const std::optional<at::Tensor>& rng);
FUSED_API void sgd_op(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                      at::TensorList scales, at::TensorList masters, at::TensorList emas, double lr,
                      double weight_decay, double momentum, double dampening, bool nesterov,
                      bool first_step, const std::optional<at::Tensor>& tensor_lr, bool maximize,
                      bool capturable, const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf,
                      const std::optional<at::Tensor>& norm, std::optional<double> max_norm,
                      bool skip_nonfinite, bool zero_grad, double ema_decay,
                      const std::optional<at::Tensor>& rng);

}  // namespace fused
