// What a step has gathered, kept for the next one: the batches of its launches, and what every
// tensor was like that they were made of.
//
// Nothing is assumed. A step walks over the tensors that it finds in the optimizer, and asks of
// each whether its memory, shape, strides, dtype and device are those that were checked and
// gathered. Where the memory alone is another (a gradient that was made anew) its pointer is
// replaced; where anything else differs, everything is gathered again. No reference is kept: a
// gradient is freed when its owner lets go of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <vector>

#include "common/prefetch.h"
#include "optim/norm_batch.h"
#include "optim/optim_glue.h"
#include "optim/optim_ops.h"

namespace fused {

class FUSED_API KeptStep {
 public:
  // Keeps the batches of a step that was checked, and flattened without a copy.
  void remember(const StepTensors& tensors, std::vector<LaunchBatch> batches,
                const StepOptions& options);
  void forget() { *this = KeptStep(); }

  // A walk over tensors in the order of remember(): for each parameter itself, its gradient, step
  // count, states with their scales, master and average, as far as there are such.
  void begin_walk() { position_ = 0; }
  bool next_is(const at::Tensor& tensor);
  // Whether that were all, and nothing that moved shares memory now.
  bool end_walk();

  // Of a step that a walk has found to be as it was.
  const std::vector<LaunchBatch>& batches() const { return batches_; }
  // Makes tables in device memory, where nothing has moved since the last step: what has moved may
  // move at every step, and then a table would be read only once.
  void bring_tables();
  // Whether the host must ask whether this step is skipped, see host_sees_skip.
  bool may_be_skipped(const StepOptions& options) const;
  void bump_versions() const;
  // A walk over the gradients alone, which collects them for a norm.
  class GradientWalk;
  // Elements of all parameters.
  int64_t numel() const { return numel_; }
  // References for as long as other threads may run.
  std::vector<at::Tensor> hold() const;

 private:
  // What a tensor is but for where it lies. Many share one.
  struct Kind {
    c10::DispatchKeySet keys;
    caffe2::TypeMeta dtype;
    c10::Device device;
    uint32_t dim;
    uint32_t shape;  // where its sizes and then its strides are in shapes_
  };
  // A tensor as the last walk has seen it. `impl` is good until the walk's caller lets others run.
  struct Seen {
    c10::TensorImpl* impl;
    void* data;
    void* slot;  // where the pointer is kept in the batches
    uint32_t kind;
    bool is_written;
    bool must_be_apart;  // may share no memory with others of its kind
  };

  void see(const at::Tensor& tensor, void* slot, bool is_written, bool must_be_apart = false);
  uint32_t kind_of(const c10::TensorImpl& impl);
  bool is_alike(const Kind& kind, const c10::TensorImpl& impl) const;
  bool shares_memory() const;

  std::vector<LaunchBatch> batches_;
  std::vector<Seen> seen_;
  std::vector<uint32_t> gradients_;  // which of those are gradients
  std::vector<Kind> kinds_;
  std::vector<int64_t> shapes_;
  size_t position_ = 0;
  int64_t numel_ = 0;
  bool host_counts_ = false, writes_grads_ = false;
  bool may_share_memory_ = false;  // something moved since it was last found not to
  bool has_moved_ = false;         // something moved since the last step
};

// A walk asks these of thousands of tensors, so they are inline and call nothing.

inline bool KeptStep::is_alike(const Kind& kind, const c10::TensorImpl& impl) const {
  if (impl.key_set() != kind.keys || impl.dtype() != kind.dtype || impl.device() != kind.device) {
    return false;
  }
  const auto sizes = impl.sizes(), strides = impl.strides();
  if (sizes.size() != kind.dim) return false;
  const int64_t *shape = shapes_.data() + kind.shape, *stride = shape + kind.dim;
  for (uint32_t d = 0; d < kind.dim; ++d) {
    if (sizes[d] != shape[d] || strides[d] != stride[d]) return false;
  }
  return true;
}

// Where a tensor's elements begin, about to be written: a lazy clone becomes one of its own.
inline void* writable_data(const c10::TensorImpl& impl, c10::StorageImpl& storage) {
  if (impl.numel() == 0) return nullptr;
  return static_cast<char*>(storage.mutable_data()) +
         static_cast<int64_t>(impl.dtype().itemsize()) * impl.storage_offset();
}

inline bool KeptStep::next_is(const at::Tensor& tensor) {
  if (position_ == seen_.size() || !tensor.defined()) return false;
  // Tensors lie scattered: what the one after some others needs is asked for now.
  constexpr size_t kAhead = 10;
  if (position_ + kAhead < seen_.size()) {
    prefetch(seen_[position_ + kAhead].impl, sizeof(c10::TensorImpl));
  }
  Seen& seen = seen_[position_];
  seen.impl = tensor.unsafeGetTensorImpl();
  c10::StorageImpl* storage = seen.impl->unsafe_storage().unsafeGetStorageImpl();
  if (storage == nullptr || !is_alike(kinds_[seen.kind], *seen.impl)) return false;
  void* data = writable_data(*seen.impl, *storage);
  if (data != seen.data) {
    seen.data = data;
    memcpy(seen.slot, &data, sizeof(data));
    may_share_memory_ |= seen.must_be_apart;
    has_moved_ = true;
  }
  ++position_;
  return true;
}

class FUSED_API KeptStep::GradientWalk {
 public:
  GradientWalk(const KeptStep& kept, NormBatches& batches) : kept_(kept), batches_(batches) {}
  // Whether the next gradient is, but for where it lies, what it was. Adds it.
  bool next_is(const at::Tensor& grad);
  // Whether that were all.
  bool end();

 private:
  const KeptStep& kept_;
  NormBatches& batches_;
  size_t position_ = 0;
  bool moved_ = false;
};

}  // namespace fused
