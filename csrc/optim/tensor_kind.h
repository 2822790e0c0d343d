#pragma once

#include <ATen/core/Tensor.h>

namespace fused {

// A dtype on a device: what a launch is for, and what FUSED_DISPATCH asks of a tensor.
class TensorKind {
 public:
  explicit TensorKind(const at::Tensor& tensor)
      : TensorKind(tensor.scalar_type(), tensor.device()) {}
  TensorKind(at::ScalarType dtype, at::Device device) : dtype_(dtype), device_(device) {}

  at::ScalarType scalar_type() const { return dtype_; }
  at::Device device() const { return device_; }
  bool is_cuda() const { return device_.is_cuda(); }
  bool operator==(const TensorKind& other) const {
    return dtype_ == other.dtype_ && device_ == other.device_;
  }

 private:
  at::ScalarType dtype_;
  at::Device device_;
};

}  // namespace fused
