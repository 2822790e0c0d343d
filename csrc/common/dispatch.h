// Which backend a call runs on. For the glue, which knows torch.
//
// FUSED_DISPATCH(tensor, attention_forward, params) calls attention_forward_cuda(params, stream) or
// attention_forward_cpu(params) by the tensor's device. In the emulated build the CUDA launchers
// take CPU tensors; in a build without CUDA there are no CUDA launchers. The caller holds a
// c10::DeviceGuard for the tensor's device.
#pragma once

#include <c10/core/DeviceGuard.h>

#include "common/checks.h"

#if defined(FUSED_EMULATED)

#define FUSED_DISPATCH(tensor, launcher, params) \
  launcher##_cuda(params, fused::current_stream((tensor).device()))

#elif defined(FUSED_WITH_CUDA)

#include <c10/cuda/CUDAStream.h>

#define FUSED_DISPATCH(tensor, launcher, params)                                          \
  ((tensor).is_cuda() ? launcher##_cuda(params, fused::current_stream((tensor).device())) \
                      : launcher##_cpu(params))

#else

#define FUSED_DISPATCH(tensor, launcher, params) launcher##_cpu(params)

#endif

namespace fused {

// The stream that a device's launches go to.
#if defined(FUSED_EMULATED)
inline Stream current_stream(c10::Device) { return nullptr; }
#elif defined(FUSED_WITH_CUDA)
inline Stream current_stream(c10::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}
#endif

// Whether FUSED_DISPATCH picks the CUDA launcher.
inline bool runs_on_cuda(const at::Tensor& tensor) {
#if defined(FUSED_EMULATED)
  (void)tensor;
  return true;
#else
  return tensor.is_cuda();
#endif
}

// Refuses devices that this build has no kernels for, by name.
inline void check_device(const char* op, const char* argument, const at::Tensor& tensor) {
#if defined(FUSED_WITH_CUDA)
  FUSED_CHECK_VALUE(tensor.is_cpu() || tensor.is_cuda(), op, ": ", argument,
                    " must be on a CPU or CUDA device, got ", tensor.device());
#else
  FUSED_CHECK_VALUE(tensor.is_cpu(), op, ": ", argument,
                    " must be on a CPU device (this build has no CUDA kernels), got ",
                    tensor.device());
#endif
}

}  // namespace fused
