// Adam and AdamW on the GPU (update.cuh). Step counts on the device are incremented by a launch of
// their own ahead of the update, because many blocks read one count.
#include "optim/update.cuh"

namespace fused {
namespace {

constexpr int kStepCapacity = 460;
struct StepTable {
  void* step[kStepCapacity];
  int32_t num_steps;
};

__global__ void __launch_bounds__(kOptimThreads)
    adam_advance_kernel(const StepTable table, const OptimCommon common, bool is_double) {
  const int32_t i = blockIdx.x * kOptimThreads + threadIdx.x;
  if (i >= table.num_steps || step_is_skipped(common)) return;
  write_step(table.step[i], is_double, read_step(table.step[i], is_double) + 1);
}

Status advance_device_steps(const OptimCommon& common, bool is_double, Stream stream) {
  StepTable table;
  table.num_steps = 0;
  const auto flush = [&]() -> Status {
    const int blocks = (table.num_steps + kOptimThreads - 1) / kOptimThreads;
    const Status status = launch(adam_advance_kernel, dim3(blocks), dim3(kOptimThreads), 0, stream,
                                 table, common, is_double);
    table.num_steps = 0;
    return status;
  };
  for (int64_t i = 0; i < common.num_tensors; ++i) {
    const OptimTensor& t = common.tensors[i];
    if (!t.step_on_device || t.step_is_double != is_double) continue;
    table.step[table.num_steps++] = t.maybe_step;
    if (table.num_steps == kStepCapacity) {
      if (const Status failed = flush()) return failed;
    }
  }
  return flush();
}

}  // namespace

Status adam_cuda(const AdamParams& params, Stream stream) {
  for (const bool is_double : {false, true}) {
    if (const Status failed = advance_device_steps(params.common, is_double, stream)) {
      return failed;
    }
  }
  return update_cuda<AdamRule>(params, stream);
}

}  // namespace fused
