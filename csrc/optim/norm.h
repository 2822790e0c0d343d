// The Euclidean norm of many tensors together, and what is done with it. No torch in here.
//
// Two stages, so that the sum has one order whatever the number of threads and blocks: the squares
// of each chunk of each tensor (optim/chunks.h), then the chunks' sums one after the other. Squares
// are added up in float64, of 16-bit and float32 elements in float32 within a pack of 16 bytes on
// the GPU. Non-finite elements give a non-finite norm, no elements give 0.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/status.h"
#include "optim/chunks.h"
#include "optim/device_table.h"

namespace fused {

struct NormTensor {
  void* data;
  int64_t numel;
};

// partials[c] = sum of squares of chunk c.
struct NormPartialsParams {
  const NormTensor* tensors;  // [num_tensors], in host memory
  int64_t num_tensors;
  DeviceTable device_table;  // of a step whose gradients these are, where there is one
  double* partials;          // [chunks of all tensors]
  DType dtype;
};

// norm = sqrt(sum of partials) / grad_scale
struct NormSumParams {
  const double* partials;  // [num_partials]
  int64_t num_partials;
  const float* maybe_grad_scale;
  double* norm;  // [1]
};

// Every tensor is multiplied by clip_coefficient(norm, max_norm); not touched where that is 1.
struct ClipParams {
  const NormTensor* tensors;  // [num_tensors], in host memory
  int64_t num_tensors;
  const double* norm;  // [1], in the memory of the kernel's device
  double max_norm;
  DType dtype;
};

static_assert(std::is_trivially_copyable_v<NormSumParams> &&
              std::is_trivially_copyable_v<ClipParams>);

// As torch.nn.utils.clip_grad_norm_ defines it: a NaN norm gives NaN, an infinite one 0.
FUSED_HOST_DEVICE double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

Status norm_partials_cpu(const NormPartialsParams& params);
Status norm_partials_cuda(const NormPartialsParams& params, Stream stream);
Status norm_sum_cpu(const NormSumParams& params);
Status norm_sum_cuda(const NormSumParams& params, Stream stream);
Status clip_cpu(const ClipParams& params);
Status clip_cuda(const ClipParams& params, Stream stream);

}  // namespace fused
