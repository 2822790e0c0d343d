#include "optim/kept_table.h"

#include <ATen/ops/empty.h>

#include <optional>

#include "common/dispatch.h"
#include "optim/chunks.h"

#if defined(FUSED_WITH_CUDA)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace fused {

#if defined(FUSED_EMULATED) || defined(FUSED_WITH_CUDA)
namespace {

// The stream by which a device's tables come and are read, or none where there are no tables.
std::optional<int64_t> table_stream([[maybe_unused]] at::Device device) {
#if defined(FUSED_EMULATED)
  return 0;
#else
  if (!device.is_cuda()) return std::nullopt;
  const c10::DeviceGuard guard(device);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return std::nullopt;
  }
  return c10::cuda::getCurrentCUDAStream(device.index()).id();
#endif
}

Status write_device_table(const TensorKind& kind, const OptimCommon& common, void* memory,
                          DeviceTable& table) {
#if defined(FUSED_EMULATED)
  (void)kind;
  return write_device_table_cuda(common, memory, table, nullptr);
#else
  return write_device_table_cuda(common, memory, table,
                                 c10::cuda::getCurrentCUDAStream(kind.device().index()).stream());
#endif
}

}  // namespace

void KeptTable::make(const TensorKind& kind, const OptimCommon& common) {
  const std::optional<int64_t> stream = table_stream(kind.device());
  if (!stream || (table_.words != nullptr && stream_ == *stream)) return;
  forget();
  if (!device_table_pays(common)) return;
  int64_t chunks = 0;
  for (int64_t i = 0; i < common.num_tensors; ++i) chunks += num_chunks(common.tensors[i].numel);
  const auto bytes = static_cast<int64_t>(device_table_bytes(common.num_tensors, chunks));
  memory_ = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(kind.device()));
  check_status("optimizer", write_device_table(kind, common, memory_.data_ptr(), table_));
  stream_ = *stream;
}

DeviceTable KeptTable::find() const {
  if (table_.words == nullptr) return {};
  return table_stream(memory_.device()) == stream_ ? table_ : DeviceTable{};
}

#else

void KeptTable::make(const TensorKind&, const OptimCommon&) {}

DeviceTable KeptTable::find() const { return {}; }

#endif

}  // namespace fused
