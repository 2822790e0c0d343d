// The activations on one accumulator, and the gradient through them as one pass over memory.
//
// Grid: as many blocks as hold all elements; one thread owns kPerThread elements, neighbours in the
// order of the result's memory.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/launch.h"
#include "conv/conv.h"

namespace fused {

__device__ __forceinline__ float device_erf(float x) { return erff(x); }
__device__ __forceinline__ double device_erf(double x) { return erf(x); }
__device__ __forceinline__ float device_exp(float x) { return expf(x); }
__device__ __forceinline__ double device_exp(double x) { return exp(x); }
__device__ __forceinline__ float device_tanh(float x) { return tanhf(x); }
__device__ __forceinline__ double device_tanh(double x) { return tanh(x); }

template <typename A>
__device__ __forceinline__ A gaussian_cdf(A x) {
  return A(0.5) * (A(1) + device_erf(x * A(0.70710678118654752440)));
}

template <typename A>
__device__ __forceinline__ A logistic(A x) {
  return A(1) / (A(1) + device_exp(-x));
}

template <typename A>
__device__ __forceinline__ A activate(Activation activation, A x) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return x < A(0) ? A(0) : x;  // NaN stays
    case Activation::kGelu:
      return x * gaussian_cdf(x);
    case Activation::kSilu:
      return x * logistic(x);
    case Activation::kLeakyRelu:
      return x < A(0) ? x * A(kLeakySlope) : x;
    case Activation::kSigmoid:
      return logistic(x);
    case Activation::kTanh:
      return device_tanh(x);
  }
  return x;
}

// grad act', from the output, or for gelu and silu from what went in.
template <typename A>
__device__ __forceinline__ A activate_backward(Activation activation, A grad, A saved) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return saved <= A(0) ? A(0) : grad;
    case Activation::kGelu: {
      const A density = A(0.39894228040143267794) * device_exp(A(-0.5) * saved * saved);
      return grad * (gaussian_cdf(saved) + saved * density);
    }
    case Activation::kSilu: {
      const A s = logistic(saved);
      return grad * (s * (A(1) + saved * (A(1) - s)));
    }
    case Activation::kLeakyRelu:
      return saved > A(0) ? grad : grad * A(kLeakySlope);
    case Activation::kSigmoid:
      return grad * (saved * (A(1) - saved));
    case Activation::kTanh:
      return grad * (A(1) - saved * saved);
  }
  return grad;
}

// Offsets of element `index`, counted along the last of `order` fastest. Axis 0 is the batch, 1 the
// channel, 2 to 4 are space.
struct ElementOffsets {
  int64_t grad_output, saved, grad_pre;
};

template <bool kChannelsLast>
__device__ __forceinline__ ElementOffsets decode_element(const ConvActivationBackwardParams& p,
                                                         int64_t index) {
  ElementOffsets o{0, 0, 0};
  const auto take = [&](int32_t size, int64_t grad_output, int64_t saved, int64_t grad_pre) {
    const int64_t i = index % size;
    index /= size;
    o.grad_output += i * grad_output;
    o.saved += i * saved;
    o.grad_pre += i * grad_pre;
  };
  const auto take_channel = [&] {
    take(p.channels, p.grad_output_stride.channel, p.saved_stride.channel,
         p.grad_pre_stride.channel);
  };
  if (kChannelsLast) take_channel();
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) {
    take(p.size[axis], p.grad_output_stride.space[axis], p.saved_stride.space[axis],
         p.grad_pre_stride.space[axis]);
  }
  if (!kChannelsLast) take_channel();
  take(p.batch, p.grad_output_stride.outer, p.saved_stride.outer, p.grad_pre_stride.outer);
  return o;
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(256)
    conv_activation_backward_kernel(const ConvActivationBackwardParams p, const int64_t count) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const ElementOffsets o = decode_element<kChannelsLast>(p, index);
  const auto grad = load(static_cast<const T*>(p.grad_output)[o.grad_output]);
  const auto saved = load(static_cast<const T*>(p.saved)[o.saved]);
  static_cast<T*>(p.grad_pre)[o.grad_pre] = store<T>(activate_backward(p.activation, grad, saved));
}

// All three tensors lie alike and without gaps: four neighbours at a time.
template <typename T>
__global__ void __launch_bounds__(256)
    conv_activation_backward_flat_kernel(const ConvActivationBackwardParams p,
                                         const int64_t count) {
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Stored {
    T element[4];
  };
  const int64_t index = 4 * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
  if (index >= count) return;
  const Stored grad =
      *reinterpret_cast<const Stored*>(static_cast<const T*>(p.grad_output) + index);
  const Stored saved = *reinterpret_cast<const Stored*>(static_cast<const T*>(p.saved) + index);
  Stored out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.element[i] =
        store<T>(activate_backward(p.activation, load(grad.element[i]), load(saved.element[i])));
  }
  *reinterpret_cast<Stored*>(static_cast<T*>(p.grad_pre) + index) = out;
}

}  // namespace fused
