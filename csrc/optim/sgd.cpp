// Glue of SGD: what the rule asks of a step (optim/run_step.h), and the registered op.
#include <memory>
#include <utility>

#include "optim/run_step.h"

namespace fused {
namespace {

constexpr const char* kStates[] = {"momentum_buffer"};

struct SgdStep {
  using Options = SgdOptions;
  using Params = SgdParams;
  static constexpr const char* kOp = "sgd";

  static void check_numbers(const SgdOptions& options) {
    check_scalar(kOp, "lr", options.tensor_lr);
  }

  static void check_tensors(const StepTensors& tensors, const SgdOptions& options) {
    check_step_tensors(kOp, tensors, options.common, kStates, options.momentum != 0 ? 1 : 0);
  }

  static void fill(const SgdOptions& options, ScalarReader& read, SgdParams& p) {
    p.lr = read(options.lr, options.tensor_lr);
    p.weight_decay = options.weight_decay;
    p.momentum = options.momentum;
    p.dampening = options.dampening;
    p.nesterov = options.nesterov;
    p.first_step = options.first_step;
  }

  static Status start(const TensorKind& on, const SgdParams& p) {
    return FUSED_DISPATCH(on, sgd, p);
  }
};

}  // namespace

std::unique_ptr<ReadyStep> prepare(StepTensors tensors, const SgdOptions& options, bool check_only,
                                   KeptStep* maybe_keep) {
  return prepare_step<SgdStep>(std::move(tensors), options, check_only, maybe_keep);
}

std::unique_ptr<ReadyStep> prepare(KeptStep& kept, const SgdOptions& options, bool check_only) {
  return prepare_kept<SgdStep>(kept, options, check_only);
}

void sgd_op(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
            at::TensorList scales, at::TensorList masters, at::TensorList emas, double lr,
            double weight_decay, double momentum, double dampening, bool nesterov, bool first_step,
            const std::optional<at::Tensor>& tensor_lr, bool maximize, bool capturable,
            const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
            const std::optional<at::Tensor>& norm, std::optional<double> max_norm,
            bool skip_nonfinite, bool zero_grad, double ema_decay,
            const std::optional<at::Tensor>& rng) {
  StepTensors tensors =
      listed_tensors(SgdStep::kOp, params, grads, {momentum_buffers}, scales, masters, emas, {});
  const SgdOptions options{{maximize, capturable, grad_scale, found_inf, norm, max_norm,
                            skip_nonfinite, zero_grad, ema_decay, rng},
                           lr,
                           weight_decay,
                           momentum,
                           dampening,
                           nesterov,
                           first_step,
                           tensor_lr};
  const auto step = prepare(std::move(tensors), options, /*check_only=*/false,
                            /*maybe_keep=*/nullptr);
  if (step) step->make();
}

}  // namespace fused
