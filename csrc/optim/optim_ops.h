// The optimizer steps as functions of tensors: what pybind11 and torch.library bind.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/status.h"

namespace fused {

// What Adam's step reads besides the tensors. A tensor_* that is set takes the number's place.
struct AdamOptions {
  double lr, beta1, beta2, weight_decay, eps;
  bool amsgrad, maximize, decoupled_weight_decay;
  // Steps and tensor hyperparameters live on the parameters' device and are read there.
  bool capturable;
  std::optional<at::Tensor> tensor_lr, tensor_beta1, tensor_beta2, grad_scale, found_inf;
};

struct SgdOptions {
  double lr, weight_decay, momentum, dampening;
  bool nesterov, maximize;
  bool first_step;  // the momentum buffers hold nothing yet
  bool capturable;  // a tensor learning rate lives on the parameters' device and is read there
  std::optional<at::Tensor> tensor_lr, grad_scale, found_inf;
};

// One step over any number of tensors, of any of the four dtypes and of several devices, in place.
// max_exp_avg_sqs is empty without amsgrad, momentum_buffers without momentum. Everything is
// checked and every temporary allocated before anything is written: a call that throws has changed
// nothing. `check_only` stops there.
FUSED_API void adam_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                         at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                         at::TensorList steps, const AdamOptions& options, bool check_only);
FUSED_API void sgd_step(at::TensorList params, at::TensorList grads,
                        at::TensorList momentum_buffers, const SgdOptions& options,
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

// The same as torch.library binds them, with plain arguments.
FUSED_API void adam_op(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
    at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs, at::TensorList steps, double lr,
    double beta1, double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
    bool decoupled_weight_decay, bool capturable, const std::optional<at::Tensor>& tensor_lr,
    const std::optional<at::Tensor>& tensor_beta1, const std::optional<at::Tensor>& tensor_beta2,
    const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf);
FUSED_API void sgd_op(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                      double lr, double weight_decay, double momentum, double dampening,
                      bool nesterov, bool maximize, bool first_step, bool capturable,
                      const std::optional<at::Tensor>& tensor_lr,
                      const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf);

}  // namespace fused
