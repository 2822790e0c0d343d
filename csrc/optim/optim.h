// Optimizer steps over many tensors at once: what the kernels read and write. No torch in here.
//
// Every tensor of a step is a flat array of `numel` elements of one dtype: the glue has made sure
// that parameter, gradient and state share one dense layout. Maths in float (double for double);
// states are kept in the parameter's dtype. Element i of the result depends on element i of the
// operands alone, so results do not depend on threads, chunks or the other tensors in the step.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/status.h"

namespace fused {

// A hyperparameter: a number, or, where `maybe_pointer` is set, a float or double in the memory of
// the kernel's own device, which the kernel reads so that the host need not wait for it.
struct OptimScalar {
  double value;
  const void* maybe_pointer;
  bool is_double;
};

// What applies to every tensor of a step, whichever optimizer.
struct OptimGradients {
  const float* maybe_grad_scale;  // gradients are divided by it and stored so (GradScaler)
  const float* maybe_found_inf;   // where it is not 0, the step changes nothing (GradScaler)
  bool maximize;
};

struct AdamTensor {
  void* param;                 // updated
  void* grad;                  // read; written only under a gradient scale
  void* exp_avg;               // updated
  void* exp_avg_sq;            // updated
  void* maybe_max_exp_avg_sq;  // updated, with amsgrad
  void* step;                  // one float or double, incremented; see the two flags
  int64_t numel;
  bool step_is_double;
  bool step_on_device;  // else in host memory, whatever the device of the rest
};

// Adam (Kingma & Ba, arXiv:1412.6980), with amsgrad (Reddi et al., arXiv:1904.09237) and decay
// either added to the gradient or decoupled from it (AdamW, arXiv:1711.05101).
struct AdamParams {
  const AdamTensor* tensors;  // [num_tensors], in host memory
  int64_t num_tensors;
  OptimScalar lr, beta1, beta2;
  double weight_decay, eps;
  OptimGradients gradients;
  DType dtype;
  bool amsgrad, decoupled_weight_decay;
};

struct SgdTensor {
  void* param;                  // updated
  void* grad;                   // read; written only under a gradient scale
  void* maybe_momentum_buffer;  // updated, with momentum
  int64_t numel;
};

// SGD with momentum as torch.optim.SGD defines it: the buffer starts as the first gradient.
struct SgdParams {
  const SgdTensor* tensors;  // [num_tensors], in host memory
  int64_t num_tensors;
  OptimScalar lr;
  double weight_decay, momentum, dampening;
  OptimGradients gradients;
  DType dtype;
  bool nesterov;
  bool first_step;  // the buffers hold nothing yet
};

static_assert(std::is_trivially_copyable_v<AdamParams> && std::is_trivially_copyable_v<SgdParams>);

Status adam_cpu(const AdamParams& params);
Status adam_cuda(const AdamParams& params, Stream stream);
Status sgd_cpu(const SgdParams& params);
Status sgd_cuda(const SgdParams& params, Stream stream);

}  // namespace fused
