// Glue of SGD: checks everything, makes flat arrays, launches once per dtype and device.
#include <c10/util/irange.h>

#include "optim/flat_tensors.h"
#include "optim/optim_glue.h"
#include "optim/optim_ops.h"

namespace fused {
namespace {

constexpr const char* kOp = "sgd";

void check(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
           const SgdOptions& options) {
  check_length(kOp, "grads", grads, params.size());
  if (options.momentum != 0) {
    check_length(kOp, "momentum_buffers", momentum_buffers, params.size());
  }
  check_scalar(kOp, "lr", options.tensor_lr);
  check_scalar(kOp, "grad_scale", options.grad_scale);
  check_scalar(kOp, "found_inf", options.found_inf);
  for (const auto i : c10::irange(params.size())) {
    check_param(kOp, params[i], grads[i]);
    if (options.grad_scale) check_writable(kOp, "grad", grads[i]);
    if (options.momentum != 0) {
      check_operand(kOp, "momentum_buffer", momentum_buffers[i], params[i]);
      check_writable(kOp, "momentum_buffer", momentum_buffers[i]);
    }
  }
}

void run(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
         const SgdOptions& options) {
  FlatTensors flat(params.size());
  std::vector<Batch<SgdTensor>> batches;
  for (const auto i : c10::irange(params.size())) {
    SgdTensor tensor;
    tensor.param = flat.param(params[i]);
    tensor.grad = flat.operand(grads[i], /*written=*/options.grad_scale.has_value());
    tensor.maybe_momentum_buffer =
        options.momentum != 0 ? flat.operand(momentum_buffers[i], /*written=*/true) : nullptr;
    tensor.numel = params[i].numel();
    batch_of(batches, params[i]).tensors.push_back(tensor);
  }
  std::vector<SgdParams> launches;
  std::vector<ScalarReader> readers;
  for (const auto& [example, tensors] : batches) {
    const c10::DeviceGuard guard(example.device());
    ScalarReader& read = readers.emplace_back(example.device(), options.capturable);
    SgdParams& p = launches.emplace_back();
    p.tensors = tensors.data();
    p.num_tensors = static_cast<int64_t>(tensors.size());
    p.lr = read(options.lr, options.tensor_lr);
    p.weight_decay = options.weight_decay;
    p.momentum = options.momentum;
    p.dampening = options.dampening;
    p.gradients = read.gradients(options.grad_scale, options.found_inf, options.maximize);
    p.dtype = dtype_of(kOp, "params", example);
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

void sgd_step(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
              const SgdOptions& options, bool check_only) {
  check(params, grads, momentum_buffers, options);
  if (check_only || params.empty()) return;
  if (share_memory(params)) {
    // The same memory twice (a parameter listed twice, overlapping views): one after the other.
    for (const auto i : c10::irange(params.size())) {
      const auto buffers = options.momentum != 0 ? momentum_buffers.slice(i, 1) : momentum_buffers;
      run(params.slice(i, 1), grads.slice(i, 1), buffers, options);
    }
  } else {
    run(params, grads, momentum_buffers, options);
  }
}

void sgd_op(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, double lr,
            double weight_decay, double momentum, double dampening, bool nesterov, bool maximize,
            bool first_step, bool capturable, const std::optional<at::Tensor>& tensor_lr,
            const std::optional<at::Tensor>& grad_scale,
            const std::optional<at::Tensor>& found_inf) {
  const SgdOptions options{lr,         weight_decay, momentum,  dampening,  nesterov, maximize,
                           first_step, capturable,   tensor_lr, grad_scale, found_inf};
  sgd_step(params, grads, momentum_buffers, options, /*check_only=*/false);
}

}  // namespace fused
