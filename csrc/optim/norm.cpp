// Glue of norms and clipping: checks everything, makes flat arrays, launches once per dtype and
// device.
#include "optim/norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/util/irange.h>

#include "optim/flat_tensors.h"
#include "optim/norm_batch.h"
#include "optim/optim_glue.h"
#include "optim/optim_ops.h"

namespace fused {
namespace {

void check_dense(const char* op, const at::Tensor& tensor) {
  FUSED_CHECK_VALUE(tensor.layout() == at::kStrided, op, ": tensors must be dense, got ",
                    tensor.layout());
  dtype_of(op, "tensors", tensor);
  check_device(op, "tensors", tensor);
}

void check_norm_scalar(const char* op, const char* argument, const at::Tensor& tensor) {
  FUSED_CHECK_VALUE(tensor.numel() == 1, op, ": ", argument, " must have one element, got shape ",
                    tensor.sizes());
}

int64_t count_chunks(const NormBatch& batch) {
  if (!batch.is_in_tables()) {
    return num_chunks(batch.tensors.data(), static_cast<int64_t>(batch.tensors.size()));
  }
  int64_t count = 0;
  for (const DeviceTable& table : batch.tables) count += table.num_chunks;
  return count;
}

// The norm of those batches that are on `device`, there.
at::Tensor norm_on(at::Device device, const NormBatches& batches,
                   const std::optional<at::Tensor>& grad_scale) {
  constexpr const char* kOp = "total_norm";
  const c10::DeviceGuard guard(device);
  NormSumParams sum{};
  for (const auto& batch : batches) {
    if (batch.kind.device() == device) sum.num_partials += count_chunks(batch);
  }
  const auto options = at::TensorOptions().dtype(at::kDouble).device(device);
  const at::Tensor partials = at::empty({sum.num_partials}, options);
  const at::Tensor norm = at::empty({}, options);
  double* next_partials = partials.data_ptr<double>();
  for (const auto& batch : batches) {
    if (batch.kind.device() != device) continue;
    NormPartialsParams p{};
    p.dtype = dtype_of(kOp, "tensors", batch.kind.scalar_type());
    const auto start = [&](int64_t num_chunks) {
      p.partials = next_partials;
      check_status(kOp, FUSED_DISPATCH(batch.kind, norm_partials, p));
      next_partials += num_chunks;
    };
    if (batch.is_in_tables()) {
      for (const DeviceTable& table : batch.tables) {
        p.device_table = table;
        start(table.num_chunks);
      }
    } else {
      p.tensors = batch.tensors.data();
      p.num_tensors = static_cast<int64_t>(batch.tensors.size());
      start(count_chunks(batch));
    }
  }
  at::Tensor scale;
  if (grad_scale) {
    scale = brought_to(device, at::kFloat, *grad_scale);
    sum.maybe_grad_scale = scale.const_data_ptr<float>();
  }
  sum.partials = partials.const_data_ptr<double>();
  sum.norm = norm.data_ptr<double>();
  check_status(kOp, FUSED_DISPATCH(norm, norm_sum, sum));
  return norm;
}

constexpr const char* kClip = "clip_by_norm_";

void clip(at::TensorList tensors, const at::Tensor& norm, double max_norm) {
  FlatTensors flat(tensors.size());
  NormBatches batches;
  for (const at::Tensor& tensor : tensors) {
    batch_of(batches, TensorKind(tensor)).tensors.push_back({flat.param(tensor), tensor.numel()});
  }
  flat.fill();
  flat.bump_versions();
  for (const auto& batch : batches) {
    const c10::DeviceGuard guard(batch.kind.device());
    const at::Tensor here = brought_to(batch.kind.device(), at::kDouble, norm);
    ClipParams p{};
    p.tensors = batch.tensors.data();
    p.num_tensors = static_cast<int64_t>(batch.tensors.size());
    p.norm = here.const_data_ptr<double>();
    p.max_norm = max_norm;
    p.dtype = dtype_of(kClip, "tensors", batch.kind.scalar_type());
    check_status(kClip, FUSED_DISPATCH(batch.kind, clip, p));
  }
  flat.finish();
}

}  // namespace

bool NormBatch::is_in_tables() const {
  size_t count = 0;
  for (const DeviceTable& table : tables) count += table.num_tensors;
  return !tables.empty() && count == tensors.size();
}

NormBatch& batch_of(NormBatches& batches, const TensorKind& kind) {
  for (NormBatch& batch : batches) {
    if (batch.kind == kind) return batch;
  }
  return batches.emplace_back(NormBatch{kind, {}, {}});
}

at::Tensor total_norm(at::TensorList tensors, const std::optional<at::Tensor>& grad_scale) {
  constexpr const char* kOp = "total_norm";
  for (const at::Tensor& tensor : tensors) check_dense(kOp, tensor);
  if (tensors.empty()) return at::zeros({}, at::kDouble);
  FlatTensors flat(tensors.size());
  NormBatches batches;
  for (const at::Tensor& tensor : tensors) {
    batch_of(batches, TensorKind(tensor))
        .tensors.push_back({flat.read_only(tensor), tensor.numel()});
  }
  return total_norm(batches, grad_scale);
}

at::Tensor total_norm(const NormBatches& batches, const std::optional<at::Tensor>& grad_scale) {
  if (grad_scale) check_norm_scalar("total_norm", "grad_scale", *grad_scale);
  std::vector<at::Device> devices;
  for (const auto& batch : batches) {
    const at::Device device = batch.kind.device();
    if (std::find(devices.begin(), devices.end(), device) == devices.end()) {
      devices.push_back(device);
    }
  }
  std::vector<at::Tensor> norms;
  for (const at::Device device : devices) {
    norms.push_back(brought_to(devices[0], at::kDouble, norm_on(device, batches, grad_scale)));
  }
  return norms.size() == 1 ? norms[0] : at::linalg_vector_norm(at::stack(norms));
}

void clip_by_norm_(at::TensorList tensors, const at::Tensor& norm, double max_norm) {
  check_norm_scalar(kClip, "norm", norm);
  for (const at::Tensor& tensor : tensors) {
    check_dense(kClip, tensor);
    check_writable(kClip, "tensors", tensor);
  }
  if (share_memory(tensors)) {
    // The same memory twice (a parameter listed twice): one after the other, scaled twice.
    for (const auto i : c10::irange(tensors.size())) clip(tensors.slice(i, 1), norm, max_norm);
  } else {
    clip(tensors, norm, max_norm);
  }
}

}  // namespace fused
