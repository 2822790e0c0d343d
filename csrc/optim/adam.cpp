// Glue of Adam and AdamW: checks everything, makes flat arrays, launches once per kind of tensor.
#include <c10/util/irange.h>

#include "optim/optim_glue.h"

namespace fused {
namespace {

constexpr const char* kOp = "adam";
constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

void check(const StepTensors& tensors, const AdamOptions& options) {
  check_scalar(kOp, "lr", options.tensor_lr);
  check_scalar(kOp, "betas[0]", options.tensor_beta1);
  check_scalar(kOp, "betas[1]", options.tensor_beta2);
  check_step_tensors(kOp, tensors, options.common, kStates, options.amsgrad ? 3 : 2);
  check_length(kOp, "steps", tensors.steps.size(), tensors.params.size());
  for (const auto i : c10::irange(tensors.params.size())) {
    check_step(kOp, tensors.steps[i], tensors.params[i], options.common.capturable);
  }
}

void run(const StepTensors& tensors, const AdamOptions& options) {
  FlatTensors flat(tensors.params.size());
  const auto batches = make_batches(flat, tensors, options.common);
  std::vector<AdamParams> launches;
  std::vector<ScalarReader> readers;
  for (const LaunchBatch& batch : batches) {
    const c10::DeviceGuard guard(batch.example.device());
    ScalarReader& read = readers.emplace_back(batch.example.device(), options.common.capturable);
    AdamParams& p = launches.emplace_back();
    p.common = batch.common(kOp, options.common, read);
    p.lr = read(options.lr, options.tensor_lr);
    p.beta1 = read(options.beta1, options.tensor_beta1);
    p.beta2 = read(options.beta2, options.tensor_beta2);
    p.weight_decay = options.weight_decay;
    p.eps = options.eps;
    p.amsgrad = options.amsgrad;
    p.decoupled_weight_decay = options.decoupled_weight_decay;
  }
  flat.bump_versions();
  for (const auto i : c10::irange(batches.size())) {
    const c10::DeviceGuard guard(batches[i].example.device());
    check_status(kOp, FUSED_DISPATCH(batches[i].example, adam, launches[i]));
  }
  flat.finish();
}

// Whether the step is skipped, as far as the host must know: a count that it keeps may not advance
// on a step that only the device knows to be skipped. With counts on the device it does not ask.
bool host_sees_skip(const TensorVector& steps, const StepOptions& options) {
  if (!options.found_inf && !(options.skip_nonfinite && options.norm)) return false;
  for (const at::Tensor& step : steps) {
    if (lives_on_device(step, options.capturable)) continue;
    return (options.found_inf && options.found_inf->item<float>() != 0) ||
           (options.skip_nonfinite && options.norm && !std::isfinite(options.norm->item<double>()));
  }
  return false;
}

}  // namespace

void adam_step(const StepTensors& tensors, const AdamOptions& options, bool check_only) {
  check(tensors, options);
  if (check_only || tensors.params.empty()) return;
  if (host_sees_skip(tensors.steps, options.common)) {
    if (options.common.zero_grad) clear_gradients(tensors.grads);
    return;
  }
  run_in_order(tensors, options, run);
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
  const StepTensors tensors = listed_tensors(
      kOp, params, grads, {exp_avgs, exp_avg_sqs, max_exp_avg_sqs}, scales, masters, emas, steps);
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
  adam_step(tensors, options, /*check_only=*/false);
}

}  // namespace fused
