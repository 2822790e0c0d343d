// Optimizer steps over many tensors at once: what the kernels read and write. No torch in here.
//
// Every tensor of a step is a flat array of `numel` elements: the glue has made sure that a
// parameter, its gradient and its states share one dense layout. Maths in float (double for
// double), whatever the states are stored as. Element i of the result depends on element i of the
// operands alone (int8 states: on its block of 256), so results do not depend on threads, chunks or
// the other tensors in the step.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/status.h"
#include "optim/device_table.h"

namespace fused {

// A hyperparameter: a number, or, where `maybe_pointer` is set, a float or double in the memory of
// the kernel's own device, which the kernel reads so that the host need not wait for it.
struct OptimScalar {
  double value;
  const void* maybe_pointer;
  bool is_double;
};

// How the states of a rule are stored. kInt8: codes of one byte, relative to the largest magnitude
// of a block (optim/quantize.h).
enum class StateType : int8_t { kAsParam, kFloat32, kBFloat16, kInt8 };

// What makes a 16-bit parameter a float32 one: a copy, or the 16 bits that a bfloat16 lacks.
enum class MasterType : int8_t { kNone, kFloat32, kRemainder };

constexpr int kMaxStates = 3;

struct OptimTensor {
  void* param;                      // updated
  void* grad;                       // read; written under a gradient scale, cleared with zero_grad
  void* states[kMaxStates];         // updated; nullptr behind those that the step has
  float* state_scales[kMaxStates];  // int8 states: the largest magnitude of each block
  void* maybe_master;               // updated: float or int16_t
  void* maybe_ema;                  // updated: the moving average, float or double
  void* maybe_step;                 // one float or double, incremented; see the two flags
  int64_t numel;
  int64_t index;  // of the parameter in the step: its stream of random numbers
  bool step_is_double;
  bool step_on_device;  // else in host memory, whatever the device of the rest
};

// What every rule has.
struct OptimCommon {
  const OptimTensor* tensors;  // [num_tensors], in host memory
  int64_t num_tensors;
  DeviceTable device_table;       // of `tensors`, where they are many and there is one
  const float* maybe_grad_scale;  // gradients are divided by it and stored so (GradScaler)
  const float* maybe_found_inf;   // where it is not 0, the step is skipped (GradScaler)
  const double* maybe_norm;       // of all gradients, after the division
  double max_norm;                // gradients are clipped to it where there is a norm
  double ema_decay;
  const int64_t* maybe_rng;  // [2], on the device: seed and offset of stochastic rounding
  DType dtype;               // of parameters and gradients
  StateType state_type;
  MasterType master;
  bool maximize;
  bool zero_grad;       // gradients become 0, in a skipped step too
  bool skip_nonfinite;  // the step is skipped where the norm is not finite
};

// Adam (Kingma & Ba, arXiv:1412.6980), with amsgrad (Reddi et al., arXiv:1904.09237) and decay
// either added to the gradient or decoupled from it (AdamW, arXiv:1711.05101).
// States: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
struct AdamParams {
  OptimCommon common;
  OptimScalar lr, beta1, beta2;
  double weight_decay, eps;
  bool amsgrad, decoupled_weight_decay;
};

// SGD with momentum as torch.optim.SGD defines it: the buffer starts as the first gradient.
// States: momentum_buffer, with momentum.
struct SgdParams {
  OptimCommon common;
  OptimScalar lr;
  double weight_decay, momentum, dampening;
  bool nesterov;
  bool first_step;  // the buffers hold nothing yet
};

static_assert(std::is_trivially_copyable_v<AdamParams> && std::is_trivially_copyable_v<SgdParams>);

Status adam_cpu(const AdamParams& params);
Status adam_cuda(const AdamParams& params, Stream stream);
Status sgd_cpu(const SgdParams& params);
Status sgd_cuda(const SgdParams& params, Stream stream);

}  // namespace fused
