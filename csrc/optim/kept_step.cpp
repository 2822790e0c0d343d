#include "optim/kept_step.h"

#include <c10/util/irange.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/checks.h"

namespace fused {
namespace {

constexpr size_t kAhead = 10;

}  // namespace

void KeptStep::remember(const StepTensors& tensors, std::vector<LaunchBatch> batches,
                        const StepOptions& options) {
  forget();
  batches_ = std::move(batches);
  zero_grad_ = options.zero_grad;
  std::vector<OptimTensor*> kept(tensors.params.size());
  for (LaunchBatch& batch : batches_) {
    for (OptimTensor& tensor : batch.tensors) kept[tensor.index] = &tensor;
  }
  const auto see_in = [&](const TensorVector& list, size_t i, void* slot) {
    if (!list.empty() && list[i].defined()) see(list[i], slot, /*is_written=*/true);
  };
  for (const auto i : c10::irange(kept.size())) {
    OptimTensor& t = *kept[i];
    numel_ += t.numel;
    host_counts_ |= t.maybe_step != nullptr && !t.step_on_device;
    see(tensors.params[i], &t.param, /*is_written=*/true, /*must_be_apart=*/true);
    gradients_.push_back(static_cast<uint32_t>(seen_.size()));
    see(tensors.grads[i], &t.grad, options.writes_grads(), /*must_be_apart=*/zero_grad_);
    see_in(tensors.steps, i, &t.maybe_step);
    for (const auto k : c10::irange(kMaxStates)) {
      see_in(tensors.states[k], i, &t.states[k]);
      see_in(tensors.scales[k], i, &t.state_scales[k]);
    }
    see_in(tensors.masters, i, &t.maybe_master);
    see_in(tensors.emas, i, &t.maybe_ema);
  }
}

void KeptStep::see(const at::Tensor& tensor, void* slot, bool is_written, bool must_be_apart) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  seen_.push_back({impl, impl->mutable_data(), slot, impl->key_set(), impl->dtype(), impl->device(),
                   is_written, must_be_apart, static_cast<uint32_t>(shapes_.size())});
  shapes_.push_back(tensor.dim());
  shapes_.insert(shapes_.end(), tensor.sizes().begin(), tensor.sizes().end());
  shapes_.insert(shapes_.end(), tensor.strides().begin(), tensor.strides().end());
}

bool KeptStep::is_alike(const Seen& seen, const c10::TensorImpl& impl) const {
  if (impl.key_set() != seen.keys || impl.dtype() != seen.dtype || impl.device() != seen.device) {
    return false;
  }
  const int64_t* shape = shapes_.data() + seen.shape;
  const auto sizes = impl.sizes(), strides = impl.strides();
  const size_t dim = sizes.size();
  return static_cast<int64_t>(dim) == shape[0] &&
         std::equal(sizes.begin(), sizes.end(), shape + 1) &&
         std::equal(strides.begin(), strides.end(), shape + 1 + dim);
}

bool KeptStep::next_is(const at::Tensor& tensor) {
  if (position_ == seen_.size() || !tensor.defined()) return false;
  // Tensors lie scattered: what the one after some others needs is asked for now.
  if (position_ + kAhead < seen_.size()) {
    const char* next = reinterpret_cast<const char*>(seen_[position_ + kAhead].impl);
    for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) {
      __builtin_prefetch(next + line);
    }
  }
  Seen& seen = seen_[position_];
  seen.impl = tensor.unsafeGetTensorImpl();
  if (!is_alike(seen, *seen.impl)) return false;
  void* data = seen.impl->mutable_data();
  if (data != seen.data) {
    seen.data = data;
    memcpy(seen.slot, &data, sizeof(data));
    may_share_memory_ |= seen.must_be_apart;
    has_moved_ = true;
  }
  ++position_;
  return true;
}

bool KeptStep::end_walk() {
  if (seen_.empty() || position_ != seen_.size()) return false;
  if (may_share_memory_ && shares_memory()) return false;
  may_share_memory_ = false;
  if (has_moved_) {
    for (LaunchBatch& batch : batches_) batch.table.forget();
  }
  return true;
}

void KeptStep::bring_tables() {
  if (!has_moved_) {
    for (LaunchBatch& batch : batches_) batch.make_table();
  }
  has_moved_ = false;
}

// All of them are dense, or they would have been copied.
bool KeptStep::shares_memory() const {
  std::vector<MemorySpan> params, grads;
  for (const LaunchBatch& batch : batches_) {
    const int64_t size = static_cast<int64_t>(c10::elementSize(batch.kind.scalar_type()));
    for (const OptimTensor& t : batch.tensors) {
      if (t.numel == 0) continue;
      const char *param = static_cast<const char*>(t.param),
                 *grad = static_cast<const char*>(t.grad);
      params.emplace_back(param, param + t.numel * size);
      if (zero_grad_) grads.emplace_back(grad, grad + t.numel * size);
    }
  }
  return overlap(params) || overlap(grads);
}

bool KeptStep::may_be_skipped(const StepOptions& options) const {
  return host_counts_ && (options.found_inf || (options.skip_nonfinite && options.norm));
}

void KeptStep::bump_versions() const {
  for (const Seen& seen : seen_) {
    if (seen.is_written && !seen.impl->is_inference()) seen.impl->bump_version();
  }
}

std::vector<at::Tensor> KeptStep::hold() const {
  std::vector<at::Tensor> tensors;
  tensors.reserve(seen_.size());
  for (const Seen& seen : seen_) {
    tensors.emplace_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(seen.impl));
  }
  return tensors;
}

bool KeptStep::GradientWalk::next_is(const at::Tensor& grad) {
  if (position_ == kept_.gradients_.size()) return false;
  const Seen& seen = kept_.seen_[kept_.gradients_[position_++]];
  c10::TensorImpl& impl = *grad.unsafeGetTensorImpl();
  if (!kept_.is_alike(seen, impl)) return false;
  void* data = const_cast<void*>(impl.data());
  moved_ |= data != seen.data;
  const TensorKind kind(seen.dtype.toScalarType(), seen.device);
  batch_of(batches_, kind).tensors.push_back({data, impl.numel()});
  return true;
}

bool KeptStep::GradientWalk::end() {
  if (position_ != kept_.gradients_.size()) return false;
  if (moved_ || kept_.has_moved_) return true;
  // A kind of more than one table has its gradients in another order than they were found in.
  std::vector<TensorKind> kinds;
  for (const LaunchBatch& batch : kept_.batches_) {
    const DeviceTable table = batch.table.find();
    if (table.words == nullptr || std::count(kinds.begin(), kinds.end(), batch.kind) > 0) continue;
    kinds.push_back(batch.kind);
    batch_of(batches_, batch.kind).tables.push_back(table);
  }
  return true;
}

}  // namespace fused
