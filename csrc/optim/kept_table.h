// A kept step's table of tensors in device memory (optim/device_table.h): made once, and read by
// the launches of all steps until a tensor moves.
#pragma once

#include <ATen/core/Tensor.h>

#include "optim/optim.h"
#include "optim/tensor_kind.h"

namespace fused {

class KeptTable {
 public:
  // Makes the table where it pays and is not there yet for the device's current stream. No stream
  // reads it but the one that wrote it.
  void make(const TensorKind& kind, const OptimCommon& common);
  // What a launch on the current stream may read; no words where there is nothing. While a graph is
  // captured there is nothing: what the graph replays must not depend on memory that is given back
  // at the next change.
  DeviceTable find() const;
  void forget() { *this = KeptTable(); }

 private:
  at::Tensor memory_;
  DeviceTable table_{};
  int64_t stream_ = 0;
};

}  // namespace fused
