// The glue of convolution: checks once, allocates, fills the params and picks the backend.
#include "conv/conv.h"

#include <ATen/DimVector.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/tf32.h"
#include "conv/conv_ops.h"

namespace fused {
namespace {

constexpr const char* kOps[] = {"conv", "conv1d", "conv2d", "conv3d"};
constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max() / 4;  // sums of a few fit too

Activation parse_activation(const char* op, std::optional<std::string_view> name) {
  if (!name) return Activation::kNone;
  constexpr std::pair<std::string_view, Activation> kNames[] = {
      {"relu", Activation::kRelu},       {"gelu", Activation::kGelu},
      {"silu", Activation::kSilu},       {"leaky_relu", Activation::kLeakyRelu},
      {"sigmoid", Activation::kSigmoid}, {"tanh", Activation::kTanh},
  };
  for (const auto& [known, activation] : kNames) {
    if (*name == known) return activation;
  }
  FUSED_CHECK_VALUE(false, op,
                    ": activation must be None, 'relu', 'gelu', 'silu', 'leaky_relu', 'sigmoid' or "
                    "'tanh', got '",
                    *name, "'");
}

// What the forward and the backward pass know of a call.
struct Call {
  const char* op;
  int64_t axes;
  ConvGeometry geometry;
  Activation activation;
  DType dtype;
  bool allow_tf32;
  at::MemoryFormat format;  // of everything that is returned
};

void check_operand(const Call& call, const char* argument, const at::Tensor& tensor,
                   const at::Tensor& input) {
  check_same_device(call.op, argument, tensor, "input", input);
  check_same_dtype(call.op, argument, tensor, "input", input);
}

void check_options(const Call& call, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation, int64_t groups) {
  const auto check = [&](const char* argument, at::IntArrayRef values, size_t count,
                         int64_t least) {
    FUSED_CHECK_VALUE(values.size() == count, call.op, ": ", argument, " must have ", count,
                      " elements, got ", values);
    for (const int64_t value : values) {
      FUSED_CHECK_VALUE(value >= least && value < kMaxExtent, call.op, ": ", argument,
                        " must be at least ", least, " and less than ", kMaxExtent, ", got ",
                        values);
    }
  };
  check("stride", stride, call.axes, 1);
  check("padding", padding, 2 * call.axes, 0);
  check("dilation", dilation, call.axes, 1);
  FUSED_CHECK_VALUE(groups >= 1, call.op, ": groups must be positive, got ", groups);
}

// One axis of space, counted from the last, into the geometry's last axes.
void set_axis(Call& call, int64_t axis, const at::Tensor& input, const at::Tensor& weight,
              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const int64_t to = 3 - call.axes + axis;
  const int64_t size = input.size(2 + axis), kernel = weight.size(2 + axis);
  FUSED_CHECK_VALUE(size < kMaxExtent && kernel < kMaxExtent, call.op,
                    ": input and kernel must be smaller than ", kMaxExtent, ", got ", input.sizes(),
                    " and ", weight.sizes());
  FUSED_CHECK_VALUE(kernel >= 1, call.op, ": weight must have a kernel of at least 1, got ",
                    weight.sizes());
  const int64_t before = padding[axis], after = padding[call.axes + axis];
  const int64_t reach = dilation[axis] * (kernel - 1) + 1;
  FUSED_CHECK_VALUE(size + before + after >= reach && reach < kMaxExtent, call.op,
                    ": weight must have a dilated kernel no larger than the padded input (",
                    size + before + after, "), got ", reach, " along axis ", axis);
  ConvGeometry& g = call.geometry;
  g.in_size[to] = static_cast<int32_t>(size);
  g.kernel[to] = static_cast<int32_t>(kernel);
  g.out_size[to] = static_cast<int32_t>((size + before + after - reach) / stride[axis] + 1);
  g.stride[to] = static_cast<int32_t>(stride[axis]);
  g.padding[to] = static_cast<int32_t>(before);
  g.dilation[to] = static_cast<int32_t>(dilation[axis]);
}

// As stock: channels-last if the input or the weight is.
at::MemoryFormat format_of(const at::Tensor& input, const at::Tensor& weight) {
  if (input.dim() < 4) return at::MemoryFormat::Contiguous;
  const auto format = input.suggest_memory_format();
  return format != at::MemoryFormat::Contiguous ? format : weight.suggest_memory_format();
}

Call check_call(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                std::optional<std::string_view> activation) {
  Call call{};
  call.axes = static_cast<int64_t>(stride.size());
  call.op = kOps[call.axes >= 1 && call.axes <= 3 ? call.axes : 0];
  FUSED_CHECK_VALUE(call.axes >= 1 && call.axes <= 3, call.op,
                    ": stride must have 1, 2 or 3 elements, got ", stride);
  check_device(call.op, "input", input);
  check_dim(call.op, "input", input, call.axes + 2);
  check_dim(call.op, "weight", weight, call.axes + 2);
  call.dtype = dtype_of(call.op, "input", input);
  check_operand(call, "weight", weight, input);
  check_options(call, stride, padding, dilation, groups);
  call.activation = parse_activation(call.op, activation);
  call.allow_tf32 = may_round_to_tf32(input, at::Float32Op::CONV);

  FUSED_CHECK_VALUE(weight.size(1) * groups == input.size(1), call.op,
                    ": weight must have input's channels / groups (", input.size(1), " / ", groups,
                    ") in its second dimension, got ", weight.sizes());
  FUSED_CHECK_VALUE(weight.size(0) > 0 && weight.size(0) % groups == 0, call.op,
                    ": weight must have a positive multiple of groups (", groups,
                    ") output channels, got ", weight.sizes());
  ConvGeometry& g = call.geometry;
  g.batch = checked_int32(call.op, "the batch", input.size(0));
  g.in_channels = checked_int32(call.op, "the number of input channels", input.size(1));
  g.out_channels = checked_int32(call.op, "the number of output channels", weight.size(0));
  g.groups = checked_int32(call.op, "groups", groups);
  for (int axis = 0; axis < 3; ++axis) {
    g.in_size[axis] = g.kernel[axis] = g.out_size[axis] = g.stride[axis] = g.dilation[axis] = 1;
  }
  for (int64_t axis = 0; axis < call.axes; ++axis) {
    set_axis(call, axis, input, weight, stride, padding, dilation);
  }
  call.format = format_of(input, weight);
  return call;
}

// Strides in three dimensions; what has extent 1 and is missing has stride 0.
ConvStrides strides_of(const at::Tensor& tensor) {
  ConvStrides s{tensor.stride(0), tensor.stride(1), {0, 0, 0}};
  for (int64_t axis = 2; axis < tensor.dim(); ++axis) {
    s.space[3 - (tensor.dim() - axis)] = tensor.stride(axis);
  }
  return s;
}

at::DimVector output_shape(const Call& call) {
  const ConvGeometry& g = call.geometry;
  at::DimVector shape{g.batch, g.out_channels};
  for (int64_t axis = 3 - call.axes; axis < 3; ++axis) shape.push_back(g.out_size[axis]);
  return shape;
}

at::Tensor nothing(const at::Tensor& like) { return at::empty({0}, like.options()); }

// grad_output through the activation, laid out as the convolution's results.
at::Tensor through_activation(const Call& call, const at::Tensor& grad_output,
                              const at::Tensor& saved) {
  at::Tensor grad_pre =
      at::empty(grad_output.sizes(), grad_output.options().memory_format(call.format));
  ConvActivationBackwardParams params{};
  params.grad_output = grad_output.const_data_ptr();
  params.saved = saved.const_data_ptr();
  params.grad_pre = grad_pre.mutable_data_ptr();
  params.grad_output_stride = strides_of(grad_output);
  params.saved_stride = strides_of(saved);
  params.grad_pre_stride = strides_of(grad_pre);
  params.batch = call.geometry.batch;
  params.channels = call.geometry.out_channels;
  std::copy(call.geometry.out_size, call.geometry.out_size + 3, params.size);
  params.dtype = call.dtype;
  params.activation = call.activation;
  check_status(call.op, FUSED_DISPATCH(grad_output, conv_activation_backward, params));
  return grad_pre;
}

// Room for the weight as the tensor-core kernels read it, where they may take the call.
at::Tensor make_packed(const Call& call, const at::Tensor& weight, bool backward_input) {
  const bool wanted = runs_on_cuda(weight) && fit_tensor_cores(call.dtype, call.allow_tf32);
  return at::empty({wanted ? conv_packed_elements(call.geometry, backward_input) : 0},
                   weight.options());
}

at::Tensor backward_input(const Call& call, const at::Tensor& grad_output, const at::Tensor& input,
                          const at::Tensor& weight) {
  at::Tensor grad = at::empty(input.sizes(), input.options().memory_format(call.format));
  if (grad.numel() == 0) return grad;
  if (conv_backward_input_sparse(call.geometry)) grad.zero_();
  ConvBackwardInputParams params{};
  params.grad_output = grad_output.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.grad_input = grad.mutable_data_ptr();
  const at::Tensor packed = make_packed(call, weight, true);
  if (packed.numel() > 0) params.maybe_packed = packed.mutable_data_ptr();
  params.grad_output_stride = strides_of(grad_output);
  params.weight_stride = strides_of(weight);
  params.grad_input_stride = strides_of(grad);
  params.geometry = call.geometry;
  params.dtype = call.dtype;
  params.allow_tf32 = call.allow_tf32;
  check_status(call.op, FUSED_DISPATCH(grad_output, conv_backward_input, params));
  return grad;
}

// What the CUDA kernels of the weight's gradient leave between their two passes.
[[maybe_unused]] at::Tensor make_partials(const Call& call, const at::Tensor& weight,
                                          bool want_weight, bool want_bias) {
  const ConvWeightSplits splits = conv_weight_splits(call.geometry);
  const int64_t count = (want_weight ? splits.weight * weight.numel() : 0) +
                        (want_bias ? splits.bias * weight.size(0) : 0);
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::empty({count}, weight.options().dtype(dtype));
}

std::tuple<at::Tensor, at::Tensor> backward_weight(const Call& call, const at::Tensor& grad_output,
                                                   const at::Tensor& input,
                                                   const at::Tensor& weight, bool want_weight,
                                                   bool want_bias) {
  at::Tensor grad_weight = nothing(weight), grad_bias = nothing(weight);
  if (want_weight) {
    grad_weight = at::empty(weight.sizes(), weight.options().memory_format(call.format));
  }
  if (want_bias) grad_bias = at::empty({weight.size(0)}, weight.options());
  if (grad_output.numel() == 0) return {grad_weight.zero_(), grad_bias.zero_()};
  ConvBackwardWeightParams params{};
  params.input = input.const_data_ptr();
  params.grad_output = grad_output.const_data_ptr();
  if (grad_weight.numel() > 0) params.maybe_grad_weight = grad_weight.mutable_data_ptr();
  if (want_bias) params.maybe_grad_bias = grad_bias.mutable_data_ptr();
  if (params.maybe_grad_weight == nullptr && !want_bias) return {grad_weight, grad_bias};
  params.input_stride = strides_of(input);
  params.grad_output_stride = strides_of(grad_output);
  if (want_weight) params.grad_weight_stride = strides_of(grad_weight);
  params.geometry = call.geometry;
  params.dtype = call.dtype;
  params.allow_tf32 = call.allow_tf32;
#if defined(FUSED_EMULATED) || defined(FUSED_WITH_CUDA)
  const at::Tensor partials = make_partials(call, weight, want_weight, want_bias);
  params.maybe_partials = partials.mutable_data_ptr();
#endif
  check_status(call.op, FUSED_DISPATCH(grad_output, conv_backward_weight, params));
  return {grad_weight, grad_bias};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> conv_forward(const at::Tensor& input, const at::Tensor& weight,
                                                const std::optional<at::Tensor>& bias,
                                                at::IntArrayRef stride, at::IntArrayRef padding,
                                                at::IntArrayRef dilation, int64_t groups,
                                                std::optional<std::string_view> activation,
                                                bool save_pre) {
  const Call call = check_call(input, weight, stride, padding, dilation, groups, activation);
  if (bias) {
    check_operand(call, "bias", *bias, input);
    check_shape(call.op, "bias", *bias, {weight.size(0)});
  }
  const c10::DeviceGuard guard(input.device());
  const auto options = input.options().memory_format(call.format);
  const at::DimVector shape = output_shape(call);
  at::Tensor output = at::empty(shape, options);
  at::Tensor pre = save_pre ? at::empty(shape, options) : nothing(input);
  if (output.numel() == 0) return {output, pre};
  const at::Tensor contiguous_bias = bias ? bias->contiguous() : at::Tensor();
  ConvForwardParams params{};
  params.input = input.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.maybe_bias = bias ? contiguous_bias.const_data_ptr() : nullptr;
  params.output = output.mutable_data_ptr();
  params.maybe_pre = save_pre ? pre.mutable_data_ptr() : nullptr;
  const at::Tensor packed = make_packed(call, weight, false);
  if (packed.numel() > 0) params.maybe_packed = packed.mutable_data_ptr();
  params.input_stride = strides_of(input);
  params.weight_stride = strides_of(weight);
  params.output_stride = strides_of(output);
  params.geometry = call.geometry;
  params.dtype = call.dtype;
  params.allow_tf32 = call.allow_tf32;
  params.activation = call.activation;
  check_status(call.op, FUSED_DISPATCH(input, conv_forward, params));
  return {output, pre};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const std::optional<at::Tensor>& saved, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, std::optional<std::string_view> activation,
    bool want_input, bool want_weight, bool want_bias) {
  const Call call = check_call(input, weight, stride, padding, dilation, groups, activation);
  const at::DimVector shape = output_shape(call);
  check_operand(call, "grad_output", grad_output, input);
  check_shape(call.op, "grad_output", grad_output, shape);
  const bool activated = call.activation != Activation::kNone;
  if (activated) {
    FUSED_CHECK_VALUE(saved.has_value(), call.op,
                      ": saved must be given with an activation, got None");
    check_operand(call, "saved", *saved, input);
    check_shape(call.op, "saved", *saved, shape);
  }
  const c10::DeviceGuard guard(input.device());
  const at::Tensor grad_pre = activated && grad_output.numel() > 0
                                  ? through_activation(call, grad_output, *saved)
                                  : grad_output;
  at::Tensor grad_input =
      want_input ? backward_input(call, grad_pre, input, weight) : nothing(input);
  auto [grad_weight, grad_bias] =
      backward_weight(call, grad_pre, input, weight, want_weight, want_bias);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace fused
