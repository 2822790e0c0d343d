#include "optim/kept_step.h"

#include <c10/util/irange.h>

#include <algorithm>
#include <utility>

#include "common/checks.h"

namespace fused {

void KeptStep::remember(const StepTensors& tensors, std::vector<LaunchBatch> batches,
                        const StepOptions& options) {
  forget();
  batches_ = std::move(batches);
  writes_grads_ = options.writes_grads();
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
    see(tensors.grads[i], &t.grad, writes_grads_, /*must_be_apart=*/writes_grads_);
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
  void* data = writable_data(*impl, *impl->unsafe_storage().unsafeGetStorageImpl());
  seen_.push_back({impl, data, slot, kind_of(*impl), is_written, must_be_apart});
}

uint32_t KeptStep::kind_of(const c10::TensorImpl& impl) {
  // That of a tensor just seen, mostly.
  constexpr size_t kLookedAt = 8;
  for (size_t back = 1; back <= std::min(kLookedAt, kinds_.size()); ++back) {
    if (is_alike(kinds_[kinds_.size() - back], impl)) {
      return static_cast<uint32_t>(kinds_.size() - back);
    }
  }
  const auto sizes = impl.sizes(), strides = impl.strides();
  kinds_.push_back({impl.key_set(), impl.dtype(), impl.device(),
                    static_cast<uint32_t>(sizes.size()), static_cast<uint32_t>(shapes_.size())});
  shapes_.insert(shapes_.end(), sizes.begin(), sizes.end());
  shapes_.insert(shapes_.end(), strides.begin(), strides.end());
  return static_cast<uint32_t>(kinds_.size() - 1);
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
      if (writes_grads_) grads.emplace_back(grad, grad + t.numel * size);
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
  const Kind& was = kept_.kinds_[seen.kind];
  if (!kept_.is_alike(was, impl)) return false;
  void* data = const_cast<void*>(impl.data());
  moved_ |= data != seen.data;
  const TensorKind kind(was.dtype.toScalarType(), was.device);
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
