// Adam and AdamW on the GPU (update.cuh). Step counts on the device are incremented by a launch of
// their own ahead of the update, because many blocks read one count.
#include "optim/update.cuh"

namespace fused {
namespace {

constexpr int kStepCapacity = 460;
struct StepTable {
  void* step[kStepCapacity];
  void** maybe_outside;  // the counts' addresses, where they are in device memory
  int32_t num_steps;
};

__global__ void __launch_bounds__(kOptimThreads)
    adam_advance_kernel(const StepTable table, const OptimCommon common, bool is_double) {
  const int32_t i = blockIdx.x * kOptimThreads + threadIdx.x;
  if (i >= table.num_steps || step_is_skipped(common)) return;
  void* step = table.maybe_outside != nullptr ? table.maybe_outside[i] : table.step[i];
  write_step(step, is_double, read_step(step, is_double) + 1);
}

Status start_advance(const OptimCommon& common, const StepTable& table, bool is_double,
                     Stream stream) {
  const int blocks = (table.num_steps + kOptimThreads - 1) / kOptimThreads;
  return launch(adam_advance_kernel, dim3(blocks), dim3(kOptimThreads), 0, stream, table, common,
                is_double);
}

Status advance_device_steps(const OptimCommon& common, bool is_double, Stream stream) {
  StepTable table;
  table.maybe_outside = nullptr;
  table.num_steps = 0;
  for (int64_t i = 0; i < common.num_tensors; ++i) {
    const OptimTensor& t = common.tensors[i];
    if (!t.step_on_device || t.step_is_double != is_double) continue;
    table.step[table.num_steps++] = t.maybe_step;
    if (table.num_steps == kStepCapacity) {
      if (const Status failed = start_advance(common, table, is_double, stream)) return failed;
      table.num_steps = 0;
    }
  }
  return start_advance(common, table, is_double, stream);
}

Status advance_device_steps(const OptimCommon& common, Stream stream) {
  if (uses_device_table(common)) {
    const OptimTensor& first = common.tensors[0];
    if (!first.step_on_device) return nullptr;
    StepTable table;
    table.maybe_outside =
        common.device_table.words + place_in_device_table(kStep) * common.num_tensors;
    table.num_steps = static_cast<int32_t>(common.num_tensors);
    return start_advance(common, table, first.step_is_double, stream);
  }
  for (const bool is_double : {false, true}) {
    if (const Status failed = advance_device_steps(common, is_double, stream)) return failed;
  }
  return nullptr;
}

}  // namespace

Status adam_cuda(const AdamParams& params, Stream stream) {
  if (const Status failed = advance_device_steps(params.common, stream)) return failed;
  return update_cuda<AdamRule>(params, stream);
}

}  // namespace fused
