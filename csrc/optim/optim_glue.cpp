#include "optim/optim_glue.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace fused {

OptimScalar ScalarReader::operator()(double value, const std::optional<at::Tensor>& maybe_tensor) {
  if (!maybe_tensor) return {value, nullptr, false};
  const at::Tensor tensor = maybe_tensor->detach();
#if !defined(FUSED_EMULATED)
  if (device_.is_cpu()) return {tensor.item<double>(), nullptr, false};
#endif
  if (!lives_on_device(tensor, capturable_)) return {tensor.item<double>(), nullptr, false};
  const bool is_double = tensor.scalar_type() == at::kDouble;
  keep_.push_back(brought_to(device_, is_double ? at::kDouble : at::kFloat, tensor));
  return {0.0, keep_.back().const_data_ptr(), is_double};
}

StepTensors StepTensors::at(size_t i) const {
  const auto one = [i](const TensorVector& list) {
    return list.empty() ? TensorVector{} : TensorVector{list[i]};
  };
  StepTensors result;
  result.params = one(params);
  result.grads = one(grads);
  for (const auto k : c10::irange(kMaxStates)) {
    result.states[k] = one(states[k]);
    result.scales[k] = one(scales[k]);
  }
  result.masters = one(masters);
  result.emas = one(emas);
  result.steps = one(steps);
  return result;
}

StepTensors listed_tensors(const char* op, at::TensorList params, at::TensorList grads,
                           std::initializer_list<at::TensorList> states, at::TensorList scales,
                           at::TensorList masters, at::TensorList emas, at::TensorList steps) {
  StepTensors tensors;
  tensors.params = params.vec();
  tensors.grads = grads.vec();
  size_t k = 0, offset = 0;
  for (const at::TensorList list : states) {
    tensors.states[k] = list.vec();
    if (!scales.empty() && !list.empty()) {
      FUSED_CHECK_VALUE(offset + list.size() <= scales.size(), op,
                        ": scales must have an entry for each state, got ", scales.size());
      tensors.scales[k] = scales.slice(offset, list.size()).vec();
      offset += list.size();
    }
    ++k;
  }
  tensors.masters = masters.vec();
  tensors.emas = emas.vec();
  tensors.steps = steps.vec();
  return tensors;
}

namespace {

StateType state_type_of(const at::Tensor& state, const at::Tensor& param) {
  if (state.scalar_type() == param.scalar_type()) return StateType::kAsParam;
  if (state.scalar_type() == at::kFloat) return StateType::kFloat32;
  return state.scalar_type() == at::kBFloat16 ? StateType::kBFloat16 : StateType::kInt8;
}

const at::Tensor* maybe_at(const TensorVector& list, size_t i) {
  return list.empty() || !list[i].defined() ? nullptr : &list[i];
}

}  // namespace

std::vector<LaunchBatch> make_batches(FlatTensors& flat, const StepTensors& tensors,
                                      const StepOptions& options) {
  std::vector<LaunchBatch> batches;
  // What one parameter's update wrote to a gradient, that of another would read.
  const bool copies_grads = options.writes_grads() && share_memory(tensors.grads);
  for (const auto i : c10::irange(tensors.params.size())) {
    const at::Tensor& param = tensors.params[i];
    OptimTensor t{};
    t.param = flat.param(param);
    t.grad = flat.operand(tensors.grads[i], options.writes_grads(), copies_grads);
    StateType state_type = StateType::kAsParam;
    for (const auto k : c10::irange(kMaxStates)) {
      const at::Tensor* state = maybe_at(tensors.states[k], i);
      if (state == nullptr) break;
      state_type = state_type_of(*state, param);
      t.states[k] = flat.operand(*state, /*written=*/true);
      if (state_type == StateType::kInt8) {
        t.state_scales[k] = static_cast<float*>(flat.whole(tensors.scales[k][i]));
      }
    }
    MasterType master = MasterType::kNone;
    if (const at::Tensor* tensor = maybe_at(tensors.masters, i)) {
      master = tensor->scalar_type() == at::kShort ? MasterType::kRemainder : MasterType::kFloat32;
      t.maybe_master = flat.operand(*tensor, /*written=*/true);
    }
    if (const at::Tensor* tensor = maybe_at(tensors.emas, i)) {
      t.maybe_ema = flat.operand(*tensor, /*written=*/true);
    }
    if (const at::Tensor* step = maybe_at(tensors.steps, i)) {
      t.maybe_step = flat.whole(*step);
      t.step_is_double = step->scalar_type() == at::kDouble;
      t.step_on_device = lives_on_device(*step, options.capturable);
    }
    t.numel = param.numel();
    t.index = static_cast<int64_t>(i);
    const TensorKind kind(param);
    const bool has_ema = t.maybe_ema != nullptr;
    const auto fits = [&](const LaunchBatch& batch) {
      return batch.kind == kind && batch.state_type == state_type && batch.master == master &&
             batch.has_ema == has_ema;
    };
    // From the end: the next tensor mostly goes where the last one went.
    const auto found = std::find_if(batches.rbegin(), batches.rend(), fits);
    if (found == batches.rend()) {
      batches.push_back({kind, {t}, state_type, master, has_ema});
      batches.back().tensors.reserve(tensors.params.size());
    } else {
      found->tensors.push_back(t);
    }
  }
  return batches;
}

OptimCommon LaunchBatch::common(const char* op, const StepOptions& options,
                                ScalarReader& read) const {
  OptimCommon c{};
  c.tensors = tensors.data();
  c.num_tensors = static_cast<int64_t>(tensors.size());
  c.maybe_grad_scale = read.pointer<float>(options.grad_scale);
  c.maybe_found_inf = read.pointer<float>(options.found_inf);
  c.maybe_norm = read.pointer<double>(options.norm);
  c.max_norm = options.max_norm.value_or(std::numeric_limits<double>::infinity());
  c.ema_decay = options.ema_decay;
  // Parameters that are not rounded need no chance.
  const bool rounds = c10::elementSize(kind.scalar_type()) == 2 && master == MasterType::kNone;
  c.maybe_rng = rounds ? read.pointer<int64_t>(options.rng) : nullptr;
  c.dtype = dtype_of(op, "params", kind.scalar_type());
  c.state_type = state_type;
  c.master = master;
  c.maximize = options.maximize;
  c.zero_grad = options.zero_grad;
  c.skip_nonfinite = options.skip_nonfinite;
  return c;
}

void LaunchBatch::make_table() {
  const c10::DeviceGuard guard(kind.device());
  OptimCommon c{};
  c.tensors = tensors.data();
  c.num_tensors = static_cast<int64_t>(tensors.size());
  table.make(kind, c);
}

void clear_gradients(const TensorVector& grads) {
  for (const at::Tensor& grad : grads) grad.detach().zero_();
}

bool host_sees_skip(const TensorVector& steps, const StepOptions& options) {
  if (!options.found_inf && !(options.skip_nonfinite && options.norm)) return false;
  for (const at::Tensor& step : steps) {
    if (lives_on_device(step, options.capturable)) continue;
    return (options.found_inf && options.found_inf->item<float>() != 0) ||
           (options.skip_nonfinite && options.norm && !std::isfinite(options.norm->item<double>()));
  }
  return false;
}

bool overlap(std::vector<MemorySpan>& spans) {
  if (!std::is_sorted(spans.begin(), spans.end())) std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].first < spans[i - 1].second) return true;
  }
  return false;
}

bool share_memory(at::TensorList tensors) {
  std::vector<MemorySpan> spans;
  spans.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const char* begin = static_cast<const char*>(tensor.const_data_ptr());
    spans.emplace_back(begin, begin + (last + 1) * tensor.element_size());
  }
  return overlap(spans);
}

}  // namespace fused
