// Convolution: the contract between the glue and the kernels.
//
// One formulation in three dimensions serves conv1d, conv2d and conv3d: missing leading dimensions
// have extent 1. N = batch, C = input channels, K = output channels, G = groups; an axis of space
// is 0 (depth), 1 (height) or 2 (width). What torch calls a convolution is a cross-correlation:
//
//   output[n, k, o] = act(bias[k] + sum over c, t of weight[k, c, t] input[n, c, o s - p + t d])
//
// with zero where the input is read outside. Only the padding before an axis appears: what is
// padded after it follows from the output's size, so that "same" needs no copy where it is uneven.
//
// Accumulation is in float, in double for double. NaN and infinities go where the sums carry them;
// those of a weight also to where its tap reads outside, in kernels that multiply by the zero there
// rather than skip it, forward and in grad_input. Every result is one fixed order of operations: no
// atomics, nothing depends on the schedule.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/status.h"

namespace fused {

enum class Activation : int8_t { kNone, kRelu, kGelu, kSilu, kLeakyRelu, kSigmoid, kTanh };
constexpr double kLeakySlope = 0.01;

// Strides in elements of an activation [N, C, space] or of a weight [K, C / G, space].
struct ConvStrides {
  int64_t outer, channel, space[3];
};

struct ConvGeometry {
  int32_t batch, in_channels, out_channels, groups;
  int32_t in_size[3], kernel[3], out_size[3];
  int32_t stride[3], padding[3], dilation[3];
};

struct ConvForwardParams {
  const void* input;       // [N, C, space], dtype
  const void* weight;      // [K, C / G, kernel], dtype
  const void* maybe_bias;  // [K], contiguous, dtype
  void* output;            // [N, K, out space], dtype
  void* maybe_pre;         // laid out as output: what the activation was applied to
  void* maybe_packed;      // conv_packed_elements() of dtype, for the CUDA kernels
  ConvStrides input_stride, weight_stride, output_stride;
  ConvGeometry geometry;
  DType dtype;
  bool allow_tf32;  // in float32: products may round their factors to it
  Activation activation;
};

// grad_input[n, c, i] = sum over k, t with o s - p + t d = i of weight[k, c, t] grad_output[n, k,
// o].
struct ConvBackwardInputParams {
  const void* grad_output;  // [N, K, out space], dtype
  const void* weight;       // [K, C / G, kernel], dtype
  void* grad_input;         // [N, C, space], dtype; zero already if conv_backward_input_sparse()
  void* maybe_packed;       // conv_packed_elements() of dtype, for the CUDA kernels
  ConvStrides grad_output_stride, weight_stride, grad_input_stride;
  ConvGeometry geometry;
  DType dtype;
  bool allow_tf32;  // in float32: products may round their factors to it
};

// grad_weight[k, c, t] = sum over n, o of grad_output[n, k, o] input[n, c, o s - p + t d],
// grad_bias[k] = sum over n, o of grad_output[n, k, o].
struct ConvBackwardWeightParams {
  const void* input;        // [N, C, space], dtype
  const void* grad_output;  // [N, K, out space], dtype
  void* maybe_grad_weight;  // [K, C / G, kernel], dtype
  void* maybe_grad_bias;    // [K], contiguous, dtype
  // What the splits of the sum left, accumulator type: conv_backward_weight_workspace() elements.
  // The CUDA kernels need it, the CPU kernels keep their own.
  void* maybe_partials;
  ConvStrides input_stride, grad_output_stride, grad_weight_stride;
  ConvGeometry geometry;
  DType dtype;
  bool allow_tf32;  // in float32: products may round their factors to it
};

// grad_pre = grad_output act'(x), act' from `saved`: the output of relu, leaky_relu, sigmoid and
// tanh, what went into gelu and silu. All three [N, K, out space].
struct ConvActivationBackwardParams {
  const void* grad_output;
  const void* saved;
  void* grad_pre;
  ConvStrides grad_output_stride, saved_stride, grad_pre_stride;
  int32_t batch, channels, size[3];
  DType dtype;
  Activation activation;
};

static_assert(std::is_trivially_copyable_v<ConvForwardParams>);
static_assert(std::is_trivially_copyable_v<ConvBackwardInputParams>);
static_assert(std::is_trivially_copyable_v<ConvBackwardWeightParams>);
static_assert(std::is_trivially_copyable_v<ConvActivationBackwardParams>);
static_assert(sizeof(ConvBackwardWeightParams) <= 4096, "every architecture's argument space");

// Whether the derivative needs what went into the activation; else it is found from the output.
constexpr bool needs_pre_activation(Activation activation) {
  return activation == Activation::kGelu || activation == Activation::kSilu;
}

// Each group has one input channel: the depthwise kernels' case.
inline bool is_depthwise(const ConvGeometry& g) { return g.in_channels == g.groups; }

// Whether some input position may meet no tap (stride beyond the kernel): nothing writes it then.
bool conv_backward_input_sparse(const ConvGeometry& geometry);

// Whether groups of so many destination and source channels are no matrix product: a correlation is
// then the depthwise kernel's.
constexpr bool takes_depthwise_kernel(int32_t groups, int32_t rows, int32_t depth) {
  return groups > 1 && (rows == 1 || depth == 1);
}

// Whether the tensor cores have products of these factors.
constexpr bool fit_tensor_cores(DType dtype, bool allow_tf32) {
  return dtype == DType::kFloat32 ? allow_tf32 : dtype != DType::kFloat64;
}

// Products that the tensor-core kernels sum between two barriers.
constexpr int kMmaDepth = 32;

// Elements of the weight as the tensor-core kernels have it laid out anew, for the forward pass or
// for the gradient of the input; 0 where takes_depthwise_kernel().
int64_t conv_packed_elements(const ConvGeometry& geometry, bool backward_input);

// How many shares of the sum over pixels the CUDA kernels take at a time, by shape alone.
struct ConvWeightSplits {
  int32_t weight, bias;
};
ConvWeightSplits conv_weight_splits(const ConvGeometry& geometry);

Status conv_forward_cpu(const ConvForwardParams& params);
Status conv_forward_cuda(const ConvForwardParams& params, Stream stream);
Status conv_backward_input_cpu(const ConvBackwardInputParams& params);
Status conv_backward_input_cuda(const ConvBackwardInputParams& params, Stream stream);
Status conv_backward_weight_cpu(const ConvBackwardWeightParams& params);
Status conv_backward_weight_cuda(const ConvBackwardWeightParams& params, Stream stream);
Status conv_activation_backward_cpu(const ConvActivationBackwardParams& params);
Status conv_activation_backward_cuda(const ConvActivationBackwardParams& params, Stream stream);

}  // namespace fused
