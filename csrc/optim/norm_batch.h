// Tensors of one dtype on one device whose norm is taken.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "optim/norm.h"
#include "optim/tensor_kind.h"

namespace fused {

struct NormBatch {
  TensorKind kind;
  std::vector<NormTensor> tensors;
  std::vector<DeviceTable> tables;  // in which the same tensors are, in this order

  // Whether those have all of them.
  bool is_in_tables() const;
};
using NormBatches = std::vector<NormBatch>;

// The batch of this kind, a new one where there is none.
FUSED_API NormBatch& batch_of(NormBatches& batches, const TensorKind& kind);

// total_norm() of dense arrays, of one batch at least.
FUSED_API at::Tensor total_norm(const NormBatches& batches,
                                const std::optional<at::Tensor>& grad_scale);

}  // namespace fused
