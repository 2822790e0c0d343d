#include "optim/flat_tensors.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>

#include "common/checks.h"

namespace fused {
namespace {

// Whether element i in memory is the same element of both. Strides of dimensions of one element
// mean nothing.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && a_strides[d] != b_strides[d]) return false;
  }
  return true;
}

}  // namespace

void* FlatTensors::param(const at::Tensor& param) {
  if (param.is_non_overlapping_and_dense() && !param.is_neg()) {
    layout_ = &param;
    written_.push_back(&param);
    return param.data_ptr();
  }
  layout_copy_ = at::empty_like(param).detach();
  layout_ = &layout_copy_;
  return operand(param, /*written=*/true);
}

void* FlatTensors::operand(const at::Tensor& tensor, bool written, bool always_copied) {
  // The memory of a negative view (the imaginary part of a conjugate is one) holds the negative.
  if (written) written_.push_back(&tensor);
  if (!always_copied && same_layout(tensor, *layout_) && !tensor.is_neg()) return tensor.data_ptr();
  const at::Tensor copy = at::empty_like(*layout_, tensor.options());
  copies_.push_back({tensor.detach(), copy, written});
  return copy.data_ptr();
}

void* FlatTensors::read_only(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense() && !tensor.is_neg()) return tensor.data_ptr();
  return temporaries_.emplace_back(tensor.detach().clone(at::MemoryFormat::Contiguous)).data_ptr();
}

void* FlatTensors::whole(const at::Tensor& tensor) {
  written_.push_back(&tensor);
  return tensor.data_ptr();
}

void FlatTensors::bump_versions() const {
  for (const at::Tensor* tensor : written_) bump_version(*tensor);
}

void FlatTensors::fill() const {
  for (const Copy& c : copies_) c.copy.copy_(c.original);
}

void FlatTensors::finish() const {
  for (const Copy& c : copies_) {
    if (c.is_written) c.original.copy_(c.copy);
  }
}

}  // namespace fused
