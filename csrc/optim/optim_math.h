// One element's update, the same for the CPU's and the GPU's kernels.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "optim/optim.h"

namespace fused {

FUSED_HOST_DEVICE double scalar_value(const OptimScalar& scalar) {
  if (scalar.maybe_pointer == nullptr) return scalar.value;
  return scalar.is_double ? *static_cast<const double*>(scalar.maybe_pointer)
                          : *static_cast<const float*>(scalar.maybe_pointer);
}

FUSED_HOST_DEVICE double read_step(const void* step, bool is_double) {
  return is_double ? *static_cast<const double*>(step) : *static_cast<const float*>(step);
}

FUSED_HOST_DEVICE void write_step(void* step, bool is_double, double value) {
  if (is_double) {
    *static_cast<double*>(step) = value;
  } else {
    *static_cast<float*>(step) = static_cast<float>(value);
  }
}

FUSED_HOST_DEVICE bool step_is_skipped(const OptimGradients& gradients) {
  return gradients.maybe_found_inf != nullptr && *gradients.maybe_found_inf != 0.0f;
}

FUSED_HOST_DEVICE float optim_sqrt(float x) { return sqrtf(x); }
FUSED_HOST_DEVICE double optim_sqrt(double x) { return sqrt(x); }

// What is the same for every element of a tensor, worked out in double once per tensor or block.
template <typename A>
struct AdamScales {
  A beta1, one_minus_beta1, beta2, one_minus_beta2;
  A step_size;              // lr / (1 - beta1^t)
  A bias_correction2_sqrt;  // sqrt(1 - beta2^t)
  A eps;
  A param_decay;  // multiplies the parameter: 1 - lr * weight_decay, or 1
  A grad_decay;   // of the parameter, added to the gradient
  A grad_scale;
  A grad_sign;  // -1 to maximize
};

template <typename A>
FUSED_HOST_DEVICE AdamScales<A> adam_scales(const AdamParams& p, double step) {
  const double lr = scalar_value(p.lr), beta1 = scalar_value(p.beta1),
               beta2 = scalar_value(p.beta2);
  AdamScales<A> s;
  s.beta1 = static_cast<A>(beta1);
  s.one_minus_beta1 = static_cast<A>(1.0 - beta1);
  s.beta2 = static_cast<A>(beta2);
  s.one_minus_beta2 = static_cast<A>(1.0 - beta2);
  s.step_size = static_cast<A>(lr / (1.0 - pow(beta1, step)));
  s.bias_correction2_sqrt = static_cast<A>(sqrt(1.0 - pow(beta2, step)));
  s.eps = static_cast<A>(p.eps);
  s.param_decay = static_cast<A>(p.decoupled_weight_decay ? 1.0 - lr * p.weight_decay : 1.0);
  s.grad_decay = static_cast<A>(p.decoupled_weight_decay ? 0.0 : p.weight_decay);
  s.grad_scale =
      p.gradients.maybe_grad_scale ? static_cast<A>(*p.gradients.maybe_grad_scale) : A(1);
  s.grad_sign = p.gradients.maximize ? A(-1) : A(1);
  return s;
}

// `grad` is already unscaled. max_exp_avg_sq is left alone without amsgrad.
template <bool kAmsgrad, typename A>
FUSED_HOST_DEVICE void adam_element(const AdamScales<A>& s, A grad, A& param, A& exp_avg,
                                    A& exp_avg_sq, A& max_exp_avg_sq) {
  A g = s.grad_sign * grad;
  // A select, not a sum with zero: 0 * inf would turn an infinite parameter's gradient into NaN.
  g = s.grad_decay != A(0) ? g + s.grad_decay * param : g;
  exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * g;
  exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (g * g);
  A second_moment = exp_avg_sq;
  if (kAmsgrad) {
    // NaN wins, as in torch.maximum.
    const bool keep = max_exp_avg_sq > exp_avg_sq || max_exp_avg_sq != max_exp_avg_sq;
    max_exp_avg_sq = keep ? max_exp_avg_sq : exp_avg_sq;
    second_moment = max_exp_avg_sq;
  }
  const A denominator = optim_sqrt(second_moment) / s.bias_correction2_sqrt + s.eps;
  param = s.param_decay * param - s.step_size * exp_avg / denominator;
}

template <typename A>
struct SgdScales {
  A lr, weight_decay, momentum, one_minus_dampening, grad_scale, grad_sign;
  bool nesterov, first_step;
};

template <typename A>
FUSED_HOST_DEVICE SgdScales<A> sgd_scales(const SgdParams& p) {
  SgdScales<A> s;
  s.lr = static_cast<A>(scalar_value(p.lr));
  s.weight_decay = static_cast<A>(p.weight_decay);
  s.momentum = static_cast<A>(p.momentum);
  s.one_minus_dampening = static_cast<A>(1.0 - p.dampening);
  s.grad_scale =
      p.gradients.maybe_grad_scale ? static_cast<A>(*p.gradients.maybe_grad_scale) : A(1);
  s.grad_sign = p.gradients.maximize ? A(-1) : A(1);
  s.nesterov = p.nesterov;
  s.first_step = p.first_step;
  return s;
}

template <bool kMomentum, typename A>
FUSED_HOST_DEVICE void sgd_element(const SgdScales<A>& s, A grad, A& param, A& momentum_buffer) {
  A g = s.grad_sign * grad;
  g = s.weight_decay != A(0) ? g + s.weight_decay * param : g;
  if (kMomentum) {
    // What an unset buffer holds is read and dropped: it may be NaN, so it is not multiplied away.
    const A later = s.momentum * momentum_buffer + s.one_minus_dampening * g;
    momentum_buffer = s.first_step ? g : later;
    g = s.nesterov ? g + s.momentum * momentum_buffer : momentum_buffer;
  }
  param -= s.lr * g;
}

}  // namespace fused
