// Glue of Adam and AdamW: checks everything, makes flat arrays, launches once per dtype and device.
#include <c10/util/irange.h>

#include "optim/flat_tensors.h"
#include "optim/optim_glue.h"
#include "optim/optim_ops.h"

namespace fused {
namespace {

constexpr const char* kOp = "adam";

struct AdamLists {
  at::TensorList params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps;

  // The lists of parameter i alone.
  AdamLists at(size_t i) const {
    const auto one = [i](at::TensorList list) { return list.empty() ? list : list.slice(i, 1); };
    return {one(params),      one(grads),           one(exp_avgs),
            one(exp_avg_sqs), one(max_exp_avg_sqs), one(steps)};
  }
};

void check_state(const char* name, const at::Tensor& state, const at::Tensor& param) {
  check_operand(kOp, name, state, param);
  check_writable(kOp, name, state);
}

void check(const AdamLists& lists, const AdamOptions& options) {
  const size_t length = lists.params.size();
  check_length(kOp, "grads", lists.grads, length);
  check_length(kOp, "exp_avgs", lists.exp_avgs, length);
  check_length(kOp, "exp_avg_sqs", lists.exp_avg_sqs, length);
  if (options.amsgrad) check_length(kOp, "max_exp_avg_sqs", lists.max_exp_avg_sqs, length);
  check_length(kOp, "steps", lists.steps, length);
  check_scalar(kOp, "lr", options.tensor_lr);
  check_scalar(kOp, "betas[0]", options.tensor_beta1);
  check_scalar(kOp, "betas[1]", options.tensor_beta2);
  check_scalar(kOp, "grad_scale", options.grad_scale);
  check_scalar(kOp, "found_inf", options.found_inf);
  for (const auto i : c10::irange(length)) {
    const at::Tensor& param = lists.params[i];
    check_param(kOp, param, lists.grads[i]);
    if (options.grad_scale) check_writable(kOp, "grad", lists.grads[i]);
    check_state("exp_avg", lists.exp_avgs[i], param);
    check_state("exp_avg_sq", lists.exp_avg_sqs[i], param);
    if (options.amsgrad) check_state("max_exp_avg_sq", lists.max_exp_avg_sqs[i], param);
    check_step(kOp, lists.steps[i], param, options.capturable);
  }
}

AdamTensor flatten(FlatTensors& flat, const AdamLists& lists, size_t i,
                   const AdamOptions& options) {
  const at::Tensor &param = lists.params[i], &step = lists.steps[i];
  AdamTensor tensor;
  tensor.param = flat.param(param);
  tensor.grad = flat.operand(lists.grads[i], /*written=*/options.grad_scale.has_value());
  tensor.exp_avg = flat.operand(lists.exp_avgs[i], /*written=*/true);
  tensor.exp_avg_sq = flat.operand(lists.exp_avg_sqs[i], /*written=*/true);
  tensor.maybe_max_exp_avg_sq =
      options.amsgrad ? flat.operand(lists.max_exp_avg_sqs[i], /*written=*/true) : nullptr;
  tensor.step = flat.scalar(step);
  tensor.numel = param.numel();
  tensor.step_is_double = step.scalar_type() == at::kDouble;
  tensor.step_on_device = lives_on_device(step, options.capturable);
  return tensor;
}

void run(const AdamLists& lists, const AdamOptions& options) {
  FlatTensors flat(lists.params.size());
  std::vector<Batch<AdamTensor>> batches;
  for (const auto i : c10::irange(lists.params.size())) {
    batch_of(batches, lists.params[i]).tensors.push_back(flatten(flat, lists, i, options));
  }
  std::vector<AdamParams> launches;
  std::vector<ScalarReader> readers;
  for (const auto& [example, tensors] : batches) {
    const c10::DeviceGuard guard(example.device());
    ScalarReader& read = readers.emplace_back(example.device(), options.capturable);
    AdamParams& p = launches.emplace_back();
    p.tensors = tensors.data();
    p.num_tensors = static_cast<int64_t>(tensors.size());
    p.lr = read(options.lr, options.tensor_lr);
    p.beta1 = read(options.beta1, options.tensor_beta1);
    p.beta2 = read(options.beta2, options.tensor_beta2);
    p.weight_decay = options.weight_decay;
    p.eps = options.eps;
    p.gradients = read.gradients(options.grad_scale, options.found_inf, options.maximize);
    p.dtype = dtype_of(kOp, "params", example);
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
bool host_sees_skip(at::TensorList steps, const AdamOptions& options) {
  if (!options.found_inf) return false;
  for (const at::Tensor& step : steps) {
    if (!lives_on_device(step, options.capturable)) return options.found_inf->item<float>() != 0;
  }
  return false;
}

}  // namespace

void adam_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
               at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs, at::TensorList steps,
               const AdamOptions& options, bool check_only) {
  const AdamLists lists{params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps};
  check(lists, options);
  if (check_only || params.empty() || host_sees_skip(steps, options)) return;
  if (share_memory(params)) {
    // The same memory twice (a parameter listed twice, overlapping views): one after the other.
    for (const auto i : c10::irange(params.size())) run(lists.at(i), options);
  } else {
    run(lists, options);
  }
}

void adam_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
             at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs, at::TensorList steps,
             double lr, double beta1, double beta2, double weight_decay, double eps, bool amsgrad,
             bool maximize, bool decoupled_weight_decay, bool capturable,
             const std::optional<at::Tensor>& tensor_lr,
             const std::optional<at::Tensor>& tensor_beta1,
             const std::optional<at::Tensor>& tensor_beta2,
             const std::optional<at::Tensor>& grad_scale,
             const std::optional<at::Tensor>& found_inf) {
  const AdamOptions options{lr,         beta1,     beta2,        weight_decay,
                            eps,        amsgrad,   maximize,     decoupled_weight_decay,
                            capturable, tensor_lr, tensor_beta1, tensor_beta2,
                            grad_scale, found_inf};
  adam_step(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, options,
            /*check_only=*/false);
}

}  // namespace fused
