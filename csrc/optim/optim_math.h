// One element's update, the same for the CPU's and the GPU's kernels.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "optim/norm.h"
#include "optim/optim.h"
#include "optim/quantize.h"
#include "optim/rounding.h"

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

FUSED_HOST_DEVICE bool step_is_skipped(const OptimCommon& c) {
  if (c.maybe_found_inf != nullptr && *c.maybe_found_inf != 0.0f) return true;
  return c.skip_nonfinite && c.maybe_norm != nullptr && !(fabs(*c.maybe_norm) <= 1.7e308);
}

// What a gradient is multiplied by, after its division by the gradient scale.
FUSED_HOST_DEVICE double grad_factor(const OptimCommon& c) {
  const double clip = c.maybe_norm != nullptr ? clip_coefficient(*c.maybe_norm, c.max_norm) : 1.0;
  return c.maximize ? -clip : clip;
}

FUSED_HOST_DEVICE float optim_sqrt(float x) { return sqrtf(x); }
FUSED_HOST_DEVICE double optim_sqrt(double x) { return sqrt(x); }

// What is the same for every element of a tensor, worked out in double once per tensor or block.
template <typename A>
struct AdamScales {
  A beta1, one_minus_beta1, beta2, one_minus_beta2;
  A step_size;    // lr / (1 - beta1^t) * sqrt(1 - beta2^t)
  A eps;          // that is given * sqrt(1 - beta2^t)
  A param_decay;  // multiplies the parameter: 1 - lr * weight_decay, or 1
  A grad_decay;   // of the parameter, added to the gradient
  A grad_factor;
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
  const double bias_correction2_sqrt = sqrt(1.0 - pow(beta2, step));
  s.step_size = static_cast<A>(lr / (1.0 - pow(beta1, step)) * bias_correction2_sqrt);
  s.eps = static_cast<A>(p.eps * bias_correction2_sqrt);
  s.param_decay = static_cast<A>(p.decoupled_weight_decay ? 1.0 - lr * p.weight_decay : 1.0);
  s.grad_decay = static_cast<A>(p.decoupled_weight_decay ? 0.0 : p.weight_decay);
  s.grad_factor = static_cast<A>(grad_factor(p.common));
  return s;
}

// `grad` is already unscaled. max_exp_avg_sq is left alone without amsgrad.
template <bool kAmsgrad, typename A>
FUSED_HOST_DEVICE void adam_element(const AdamScales<A>& s, A grad, A& param, A& exp_avg,
                                    A& exp_avg_sq, A& max_exp_avg_sq) {
  A g = s.grad_factor * grad;
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
  // m / (sqrt(v) / c + eps) as c m / (sqrt(v) + c eps), with c in step_size and eps: one division.
  const A denominator = optim_sqrt(second_moment) + s.eps;
  param = s.param_decay * param - s.step_size * exp_avg / denominator;
}

template <typename A>
struct SgdScales {
  A lr, weight_decay, momentum, one_minus_dampening, grad_factor;
  bool nesterov, first_step;
};

template <typename A>
FUSED_HOST_DEVICE SgdScales<A> sgd_scales(const SgdParams& p) {
  SgdScales<A> s;
  s.lr = static_cast<A>(scalar_value(p.lr));
  s.weight_decay = static_cast<A>(p.weight_decay);
  s.momentum = static_cast<A>(p.momentum);
  s.one_minus_dampening = static_cast<A>(1.0 - p.dampening);
  s.grad_factor = static_cast<A>(grad_factor(p.common));
  s.nesterov = p.nesterov;
  s.first_step = p.first_step;
  return s;
}

template <bool kMomentum, typename A>
FUSED_HOST_DEVICE void sgd_element(const SgdScales<A>& s, A grad, A& param, A& momentum_buffer) {
  A g = s.grad_factor * grad;
  g = s.weight_decay != A(0) ? g + s.weight_decay * param : g;
  if (kMomentum) {
    // What an unset buffer holds is read and dropped: it may be NaN, so it is not multiplied away.
    const A later = s.momentum * momentum_buffer + s.one_minus_dampening * g;
    momentum_buffer = s.first_step ? g : later;
    g = s.nesterov ? g + s.momentum * momentum_buffer : momentum_buffer;
  }
  param -= s.lr * g;
}

// What a kernel asks of a rule, with one shape for all: up to three states, of which the last is an
// option (kAll), and what is the same for every element worked out once per tensor.
struct AdamRule {
  using Params = AdamParams;
  template <typename A>
  using Scales = AdamScales<A>;
  static constexpr int kNumStates = 3;
  template <int state>
  static constexpr bool kUnsigned = state > 0;
  static FUSED_HOST_DEVICE bool has_all(const AdamParams& p) { return p.amsgrad; }
  template <typename A>
  static FUSED_HOST_DEVICE AdamScales<A> scales(const AdamParams& p, double step) {
    return adam_scales<A>(p, step);
  }
  template <bool kAll, typename A>
  static FUSED_HOST_DEVICE void element(const AdamScales<A>& s, A grad, A& param, A& exp_avg,
                                        A& exp_avg_sq, A& max_exp_avg_sq) {
    adam_element<kAll>(s, grad, param, exp_avg, exp_avg_sq, max_exp_avg_sq);
  }
};

struct SgdRule {
  using Params = SgdParams;
  template <typename A>
  using Scales = SgdScales<A>;
  static constexpr int kNumStates = 1;
  template <int>
  static constexpr bool kUnsigned = false;
  static FUSED_HOST_DEVICE bool has_all(const SgdParams& p) { return p.momentum != 0; }
  template <typename A>
  static FUSED_HOST_DEVICE SgdScales<A> scales(const SgdParams& p, double) {
    return sgd_scales<A>(p);
  }
  template <bool kAll, typename A>
  static FUSED_HOST_DEVICE void element(const SgdScales<A>& s, A grad, A& param, A& momentum_buffer,
                                        A&, A&) {
    sgd_element<kAll>(s, grad, param, momentum_buffer);
  }
};

// Calls visitor(T{}, S{}) with the types in which parameters and states are stored; uint8_t stands
// for the codes of int8 states.
template <typename Visitor>
auto visit_types(const OptimCommon& c, Visitor&& visitor) {
  return visit_dtype(c.dtype, [&](auto type) {
    switch (c.state_type) {
      case StateType::kFloat32:
        return visitor(type, float{});
      case StateType::kBFloat16:
        return visitor(type, BFloat16{});
      case StateType::kInt8:
        return visitor(type, uint8_t{});
      case StateType::kAsParam:
        break;
    }
    return visitor(type, type);
  });
}

}  // namespace fused
