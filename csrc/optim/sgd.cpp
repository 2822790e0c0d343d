// Glue of SGD: checks everything, makes flat arrays, launches once per kind of tensor.
#include <c10/util/irange.h>

#include "optim/optim_glue.h"

namespace fused {
namespace {

constexpr const char* kOp = "sgd";
constexpr const char* kStates[] = {"momentum_buffer"};

void run(const StepTensors& tensors, const SgdOptions& options) {
  FlatTensors flat(tensors.params.size());
  const auto batches = make_batches(flat, tensors, options.common);
  std::vector<SgdParams> launches;
  std::vector<ScalarReader> readers;
  for (const LaunchBatch& batch : batches) {
    const c10::DeviceGuard guard(batch.example.device());
    ScalarReader& read = readers.emplace_back(batch.example.device(), options.common.capturable);
    SgdParams& p = launches.emplace_back();
    p.common = batch.common(kOp, options.common, read);
    p.lr = read(options.lr, options.tensor_lr);
    p.weight_decay = options.weight_decay;
    p.momentum = options.momentum;
    p.dampening = options.dampening;
    p.nesterov = options.nesterov;
    p.first_step = options.first_step;
  }
  flat.bump_versions();
  for (const auto i : c10::irange(batches.size())) {
    const c10::DeviceGuard guard(batches[i].example.device());
    check_status(kOp, FUSED_DISPATCH(batches[i].example, sgd, launches[i]));
  }
  flat.finish();
}

}  // namespace

void sgd_step(const StepTensors& tensors, const SgdOptions& options, bool check_only) {
  check_scalar(kOp, "lr", options.tensor_lr);
  check_step_tensors(kOp, tensors, options.common, kStates, options.momentum != 0 ? 1 : 0);
  if (check_only || tensors.params.empty()) return;
  run_in_order(tensors, options, run);
}

void sgd_op(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
            at::TensorList scales, at::TensorList masters, at::TensorList emas, double lr,
            double weight_decay, double momentum, double dampening, bool nesterov, bool first_step,
            const std::optional<at::Tensor>& tensor_lr, bool maximize, bool capturable,
            const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
            const std::optional<at::Tensor>& norm, std::optional<double> max_norm,
            bool skip_nonfinite, bool zero_grad, double ema_decay,
            const std::optional<at::Tensor>& rng) {
  const StepTensors tensors =
      listed_tensors(kOp, params, grads, {momentum_buffers}, scales, masters, emas, {});
  const SgdOptions options{{maximize, capturable, grad_scale, found_inf, norm, max_norm,
                            skip_nonfinite, zero_grad, ema_decay, rng},
                           lr,
                           weight_decay,
                           momentum,
                           dampening,
                           nesterov,
                           first_step,
                           tensor_lr};
  sgd_step(tensors, options, /*check_only=*/false);
}

}  // namespace fused
