// The only wording of errors: `op: argument must rule, got value`. For the glue, which knows torch.
//
// TypeError for a dtype, ValueError for a shape, stride, device or range, NotImplementedError for
// what is valid but unsupported, RuntimeError for a launch that failed. A test matches the texts.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <string>

#include "common/dtype.h"
#include "common/status.h"

#define FUSED_CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(condition, __VA_ARGS__)
#define FUSED_CHECK_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, __VA_ARGS__)
#define FUSED_CHECK_NOT_IMPLEMENTED(condition, ...) \
  TORCH_CHECK_NOT_IMPLEMENTED(condition, __VA_ARGS__)

namespace fused {

inline DType dtype_of(const char* op, const char* argument, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      FUSED_CHECK_TYPE(false, op, ": ", argument,
                       " must be float32, float64, float16 or bfloat16, got ", type);
  }
}

inline DType dtype_of(const char* op, const char* argument, const at::Tensor& tensor) {
  return dtype_of(op, argument, tensor.scalar_type());
}

inline void check_same_dtype(const char* op, const char* argument, const at::Tensor& tensor,
                             const char* other_argument, const at::Tensor& other) {
  FUSED_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), op, ": ", argument,
                   " must have the dtype of ", other_argument, " (", other.scalar_type(), "), got ",
                   tensor.scalar_type());
}

inline void check_same_device(const char* op, const char* argument, const at::Tensor& tensor,
                              const char* other_argument, const at::Tensor& other) {
  FUSED_CHECK_VALUE(tensor.device() == other.device(), op, ": ", argument,
                    " must be on the device of ", other_argument, " (", other.device(), "), got ",
                    tensor.device());
}

inline void check_dim(const char* op, const char* argument, const at::Tensor& tensor, int64_t dim) {
  FUSED_CHECK_VALUE(tensor.dim() == dim, op, ": ", argument, " must have ", dim,
                    " dimensions, got ", tensor.sizes());
}

inline void check_shape(const char* op, const char* argument, const at::Tensor& tensor,
                        at::IntArrayRef shape) {
  FUSED_CHECK_VALUE(tensor.sizes() == shape, op, ": ", argument, " must have the shape ", shape,
                    ", got ", tensor.sizes());
}

// Kernels count extents in 32 bits; offsets are 64-bit throughout.
inline int32_t checked_int32(const char* op, const char* what, int64_t value) {
  FUSED_CHECK_VALUE(value <= std::numeric_limits<int32_t>::max(), op, ": ", what,
                    " must be less than 2^31, got ", value);
  return static_cast<int32_t>(value);
}

inline void check_status(const char* op, Status status) {
  TORCH_CHECK(status == nullptr, op, ": ", status);
}

inline void check_supported(const char* op, const char* unsupported) {
  FUSED_CHECK_NOT_IMPLEMENTED(unsupported == nullptr, op, ": ", unsupported);
}

// Neither pybind11 nor a plain registration marks an argument as changed: a kernel's glue does.
// Tensors made in inference mode have no version to bump, and no graph that could be stale.
inline void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace fused
