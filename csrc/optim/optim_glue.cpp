#include "optim/optim_glue.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <utility>

#include "optim/optim_ops.h"

namespace fused {

OptimScalar ScalarReader::operator()(double value, const std::optional<at::Tensor>& maybe_tensor) {
  if (!maybe_tensor) return {value, nullptr, false};
  const at::Tensor tensor = maybe_tensor->detach();
#if !defined(FUSED_EMULATED)
  if (device_.is_cpu()) return {tensor.item<double>(), nullptr, false};
#endif
  if (!lives_on_device(tensor, capturable_)) return {tensor.item<double>(), nullptr, false};
  const bool is_double = tensor.scalar_type() == at::kDouble;
  keep_.push_back(tensor.to(device_, is_double ? at::kDouble : at::kFloat, /*non_blocking=*/true));
  return {0.0, keep_.back().const_data_ptr(), is_double};
}

const float* ScalarReader::float_pointer(const std::optional<at::Tensor>& maybe_tensor) {
  if (!maybe_tensor) return nullptr;
  keep_.push_back(maybe_tensor->detach().to(device_, at::kFloat, /*non_blocking=*/true));
  return keep_.back().const_data_ptr<float>();
}

OptimGradients ScalarReader::gradients(const std::optional<at::Tensor>& grad_scale,
                                       const std::optional<at::Tensor>& found_inf, bool maximize) {
  return {float_pointer(grad_scale), float_pointer(found_inf), maximize};
}

void check_length(const char* op, const char* argument, at::TensorList list, size_t length) {
  FUSED_CHECK_VALUE(list.size() == length, op, ": ", argument, " must have the length of params (",
                    length, "), got ", list.size());
}

void check_scalar(const char* op, const char* argument, const std::optional<at::Tensor>& tensor) {
  FUSED_CHECK_VALUE(!tensor || tensor->numel() == 1, op, ": ", argument,
                    " must have one element, got shape ", tensor->sizes());
}

void check_step(const char* op, const at::Tensor& step, const at::Tensor& param, bool capturable) {
  FUSED_CHECK_VALUE(step.numel() == 1, op, ": step must have one element, got shape ",
                    step.sizes());
  FUSED_CHECK_TYPE(step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble, op,
                   ": step must be float32 or float64, got ", step.scalar_type());
#if !defined(FUSED_EMULATED)
  FUSED_CHECK_VALUE(!capturable || param.is_cuda(), op,
                    ": capturable must be False for parameters off the GPU, got parameters on ",
                    param.device());
#endif
  FUSED_CHECK_VALUE(step.device() == param.device() || (step.is_cpu() && !capturable), op,
                    ": step must be on the device of params (", param.device(), ")",
                    capturable ? "" : " or on the CPU", ", got ", step.device());
}

void check_operand(const char* op, const char* argument, const at::Tensor& tensor,
                   const at::Tensor& param) {
  FUSED_CHECK_VALUE(tensor.layout() == at::kStrided, op, ": ", argument,
                    " must be a dense tensor, got ", tensor.layout());
  check_same_dtype(op, argument, tensor, "its parameter", param);
  check_same_device(op, argument, tensor, "its parameter", param);
  check_shape(op, argument, tensor, param.sizes());
}

void check_param(const char* op, const at::Tensor& param, const at::Tensor& grad) {
  FUSED_CHECK_VALUE(param.layout() == at::kStrided, op, ": params must be dense tensors, got ",
                    param.layout());
  dtype_of(op, "params", param);
  check_device(op, "params", param);
  check_writable(op, "params", param);
  check_operand(op, "grad", grad, param);
}

void check_writable(const char* op, const char* argument, const at::Tensor& tensor) {
  FUSED_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, op, ": ", argument,
                    " must not hold one memory location twice, got strides ", tensor.strides());
}

void check_gradients(const char* op, at::TensorList params, at::TensorList grads) {
  for (size_t i = 0; i < params.size(); ++i) check_param(op, params[i], grads[i]);
}

bool share_memory(at::TensorList params) {
  std::vector<std::pair<const char*, const char*>> spans;
  spans.reserve(params.size());
  for (const at::Tensor& param : params) {
    if (param.numel() == 0) continue;
    int64_t last = 0;
    for (int64_t d = 0; d < param.dim(); ++d) last += (param.size(d) - 1) * param.stride(d);
    const char* begin = static_cast<const char*>(param.const_data_ptr());
    spans.emplace_back(begin, begin + (last + 1) * param.element_size());
  }
  if (!std::is_sorted(spans.begin(), spans.end())) std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].first < spans[i - 1].second) return true;
  }
  return false;
}

}  // namespace fused
