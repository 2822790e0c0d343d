// Glue of Adam and AdamW: what the rule asks of a step (optim/run_step.h), and the registered op.
#include <c10/util/irange.h>

#include <memory>
#include <utility>

#include "optim/run_step.h"

namespace fused {
namespace {

constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

struct AdamStep {
  using Options = AdamOptions;
  using Params = AdamParams;
  static constexpr const char* kOp = "adam";

  static void check_numbers(const AdamOptions& options) {
    check_scalar(kOp, "lr", options.tensor_lr);
    check_scalar(kOp, "betas[0]", options.tensor_beta1);
    check_scalar(kOp, "betas[1]", options.tensor_beta2);
  }

  static void check_tensors(const StepTensors& tensors, const AdamOptions& options) {
    check_step_tensors(kOp, tensors, options.common, kStates, options.amsgrad ? 3 : 2);
    check_length(kOp, "steps", tensors.steps.size(), tensors.params.size());
    for (const auto i : c10::irange(tensors.params.size())) {
      check_step(kOp, tensors.steps[i], tensors.params[i], options.common.capturable);
    }
  }

  static void fill(const AdamOptions& options, ScalarReader& read, AdamParams& p) {
    p.lr = read(options.lr, options.tensor_lr);
    p.beta1 = read(options.beta1, options.tensor_beta1);
    p.beta2 = read(options.beta2, options.tensor_beta2);
    p.weight_decay = options.weight_decay;
    p.eps = options.eps;
    p.amsgrad = options.amsgrad;
    p.decoupled_weight_decay = options.decoupled_weight_decay;
  }

  static Status start(const TensorKind& on, const AdamParams& p) {
    return FUSED_DISPATCH(on, adam, p);
  }
};

}  // namespace

std::unique_ptr<ReadyStep> prepare(StepTensors tensors, const AdamOptions& options, bool check_only,
                                   KeptStep* maybe_keep) {
  return prepare_step<AdamStep>(std::move(tensors), options, check_only, maybe_keep);
}

std::unique_ptr<ReadyStep> prepare(KeptStep& kept, const AdamOptions& options, bool check_only) {
  return prepare_kept<AdamStep>(kept, options, check_only);
}

void adam_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
             at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs, at::TensorList steps,
             at::TensorList scales, at::TensorList masters, at::TensorList emas, double lr,
             double beta1, double beta2, double weight_decay, double eps, bool amsgrad,
             bool decoupled_weight_decay, const std::optional<at::Tensor>& tensor_beta1,
             const std::optional<at::Tensor>& tensor_beta2,
             const std::optional<at::Tensor>& tensor_lr, bool maximize, bool capturable,
             const std::optional<at::Tensor>& grad_scale,
             const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& norm,
             std::optional<double> max_norm, bool skip_nonfinite, bool zero_grad, double ema_decay,
             const std::optional<at::Tensor>& rng) {
  StepTensors tensors =
      listed_tensors(AdamStep::kOp, params, grads, {exp_avgs, exp_avg_sqs, max_exp_avg_sqs}, scales,
                     masters, emas, steps);
  const AdamOptions options{{maximize, capturable, grad_scale, found_inf, norm, max_norm,
                             skip_nonfinite, zero_grad, ema_decay, rng},
                            lr,
                            beta1,
                            beta2,
                            weight_decay,
                            eps,
                            amsgrad,
                            decoupled_weight_decay,
                            tensor_lr,
                            tensor_beta1,
                            tensor_beta2};
  const auto step = prepare(std::move(tensors), options, /*check_only=*/false,
                            /*maybe_keep=*/nullptr);
  if (step) step->make();
}

}  // namespace fused
