// What the tensors of a step must be, whichever rule. Everything is looked at before anything is
// written.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/irange.h>

#include "optim/optim_glue.h"
#include "optim/quantize.h"

namespace fused {

void check_length(const char* op, const char* argument, size_t got, size_t length) {
  FUSED_CHECK_VALUE(got == length, op, ": ", argument, " must have the length of params (", length,
                    "), got ", got);
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

void check_writable(const char* op, const char* argument, const at::Tensor& tensor) {
  FUSED_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, op, ": ", argument,
                    " must not hold one memory location twice, got strides ", tensor.strides());
}

namespace {

// Throws unless `tensor` lies beside `param`: same shape, device, and strided.
void check_beside(const char* op, const char* argument, const at::Tensor& tensor,
                  const at::Tensor& param) {
  FUSED_CHECK_VALUE(tensor.layout() == at::kStrided, op, ": ", argument,
                    " must be a dense tensor, got ", tensor.layout());
  check_same_device(op, argument, tensor, "its parameter", param);
  check_shape(op, argument, tensor, param.sizes());
}

bool is_code(at::ScalarType type) { return type == at::kChar || type == at::kByte; }

// Blocks of int8 states lie along memory: one layout for both, or they would be another's.
bool lies_alike(const at::Tensor& tensor, const at::Tensor& param) {
  const at::Tensor dense = param.is_non_overlapping_and_dense() ? param : at::empty_like(param);
  for (const auto d : c10::irange(param.dim())) {
    if (param.size(d) != 1 && tensor.stride(d) != dense.stride(d)) return false;
  }
  return true;
}

void check_state(const char* op, const char* name, const at::Tensor& state, const at::Tensor& param,
                 bool is_signed) {
  const at::ScalarType type = state.scalar_type();
  FUSED_CHECK_TYPE(type == param.scalar_type() || type == at::kFloat || type == at::kBFloat16 ||
                       type == (is_signed ? at::kChar : at::kByte),
                   op, ": ", name, " must have the dtype of its parameter (", param.scalar_type(),
                   "), float32, bfloat16 or ", is_signed ? "int8" : "uint8", ", got ", type);
  check_beside(op, name, state, param);
  check_writable(op, name, state);
  FUSED_CHECK_VALUE(!is_code(type) || lies_alike(state, param), op, ": ", name,
                    " of int8 must lie in memory as its parameter does, got strides ",
                    state.strides(), " beside ", param.strides());
}

void check_scale(const char* op, const char* name, const at::Tensor& scale,
                 const at::Tensor& param) {
  const int64_t blocks = num_quant_blocks(param.numel());
  const std::string argument = std::string(name) + "_scale";
  FUSED_CHECK_TYPE(scale.scalar_type() == at::kFloat, op, ": ", argument, " must be float32, got ",
                   scale.scalar_type());
  check_same_device(op, argument.c_str(), scale, "its parameter", param);
  check_shape(op, argument.c_str(), scale, {blocks});
  FUSED_CHECK_VALUE(scale.is_contiguous(), op, ": ", argument, " must be contiguous, got strides ",
                    scale.strides());
}

void check_master(const char* op, const at::Tensor& master, const at::Tensor& param) {
  const bool remainder = master.scalar_type() == at::kShort;
  FUSED_CHECK_TYPE(remainder || master.scalar_type() == at::kFloat, op,
                   ": master must be float32 or int16, got ", master.scalar_type());
  FUSED_CHECK_TYPE(
      param.scalar_type() == at::kBFloat16 || (!remainder && param.scalar_type() == at::kHalf), op,
      ": params with a master must be ", remainder ? "bfloat16" : "float16 or bfloat16", ", got ",
      param.scalar_type());
  check_beside(op, "master", master, param);
  check_writable(op, "master", master);
}

void check_ema(const char* op, const at::Tensor& ema, const at::Tensor& param) {
  const at::ScalarType expected = param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  FUSED_CHECK_TYPE(ema.scalar_type() == expected, op, ": ema must be ", expected, ", got ",
                   ema.scalar_type());
  check_beside(op, "ema", ema, param);
  check_writable(op, "ema", ema);
}

void check_rng(const char* op, const std::optional<at::Tensor>& rng) {
  if (!rng) return;
  FUSED_CHECK_TYPE(rng->scalar_type() == at::kLong, op, ": rng must be int64, got ",
                   rng->scalar_type());
  check_shape(op, "rng", *rng, {2});
}

}  // namespace

void check_param(const char* op, const at::Tensor& param, const at::Tensor& grad) {
  FUSED_CHECK_VALUE(param.layout() == at::kStrided, op, ": params must be dense tensors, got ",
                    param.layout());
  dtype_of(op, "params", param);
  check_device(op, "params", param);
  check_writable(op, "params", param);
  check_same_dtype(op, "grad", grad, "its parameter", param);
  check_beside(op, "grad", grad, param);
}

void check_gradients(const char* op, at::TensorList params, at::TensorList grads) {
  for (const auto i : c10::irange(params.size())) check_param(op, params[i], grads[i]);
}

void check_step_options(const char* op, const StepOptions& options) {
  check_scalar(op, "grad_scale", options.grad_scale);
  check_scalar(op, "found_inf", options.found_inf);
  check_scalar(op, "norm", options.norm);
  check_rng(op, options.rng);
}

void check_step_tensors(const char* op, const StepTensors& tensors, const StepOptions& options,
                        const char* const* state_names, size_t num_states) {
  const size_t length = tensors.params.size();
  check_length(op, "grads", tensors.grads.size(), length);
  for (const auto k : c10::irange(num_states)) {
    check_length(op, state_names[k], tensors.states[k].size(), length);
    if (!tensors.scales[k].empty()) check_length(op, "scales", tensors.scales[k].size(), length);
  }
  if (!tensors.masters.empty()) check_length(op, "masters", tensors.masters.size(), length);
  if (!tensors.emas.empty()) check_length(op, "emas", tensors.emas.size(), length);
  const bool writes_grads = options.writes_grads();
  for (const auto i : c10::irange(length)) {
    const at::Tensor& param = tensors.params[i];
    check_param(op, param, tensors.grads[i]);
    if (writes_grads) check_writable(op, "grad", tensors.grads[i]);
    for (const auto k : c10::irange(num_states)) {
      const at::Tensor& state = tensors.states[k][i];
      check_state(op, state_names[k], state, param, /*is_signed=*/k == 0);
      FUSED_CHECK_TYPE(
          is_code(state.scalar_type()) == is_code(tensors.states[0][i].scalar_type()) &&
              (is_code(state.scalar_type()) ||
               state.scalar_type() == tensors.states[0][i].scalar_type()),
          op, ": ", state_names[k], " must be stored as ", state_names[0], " is (",
          tensors.states[0][i].scalar_type(), "), got ", state.scalar_type());
      if (!is_code(state.scalar_type())) continue;
      FUSED_CHECK_VALUE(!tensors.scales[k].empty() && tensors.scales[k][i].defined(), op, ": ",
                        state_names[k], " of int8 must have a scale, got none");
      check_scale(op, state_names[k], tensors.scales[k][i], param);
    }
    if (!tensors.masters.empty() && tensors.masters[i].defined()) {
      check_master(op, tensors.masters[i], param);
    }
    if (!tensors.emas.empty() && tensors.emas[i].defined()) {
      check_ema(op, tensors.emas[i], param);
    }
  }
}

}  // namespace fused
