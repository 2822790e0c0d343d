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

#include <vector>

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
  // A tensor as the last walk has seen it. `impl` is good until the walk's caller lets others run.
  struct Seen {
    c10::TensorImpl* impl;
    void* data;
    void* slot;  // where the pointer is kept in the batches
    c10::DispatchKeySet keys;
    caffe2::TypeMeta dtype;
    c10::Device device;
    bool is_written;
    bool must_be_apart;  // may share no memory with others of its kind
    uint32_t shape;      // where its sizes and strides are in shapes_
  };

  void see(const at::Tensor& tensor, void* slot, bool is_written, bool must_be_apart = false);
  bool is_alike(const Seen& seen, const c10::TensorImpl& impl) const;
  bool shares_memory() const;

  std::vector<LaunchBatch> batches_;
  std::vector<Seen> seen_;
  std::vector<uint32_t> gradients_;  // which of those are gradients
  std::vector<int64_t> shapes_;      // for each tensor its number of dimensions, sizes and strides
  size_t position_ = 0;
  int64_t numel_ = 0;
  bool host_counts_ = false, zero_grad_ = false;
  bool may_share_memory_ = false;  // something moved since it was last found not to
  bool has_moved_ = false;         // something moved since the last step
};

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
