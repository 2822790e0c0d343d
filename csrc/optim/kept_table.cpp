#include "optim/kept_table.h"

#include <ATen/ops/empty.h>

#include <optional>

#include "common/dispatch.h"

#if defined(FUSED_EMULATED)
#include "emulator/capture.h"
#elif defined(FUSED_WITH_CUDA)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace fused {

#if defined(FUSED_EMULATED) || defined(FUSED_WITH_CUDA)
namespace {

// The stream by which a device's tables come and are read, or none where there are no tables: a
// captured graph would outlive the table that it reads.
std::optional<int64_t> table_stream([[maybe_unused]] at::Device device) {
#if defined(FUSED_EMULATED)
  return emulator::is_capturing() ? std::nullopt : std::optional<int64_t>(0);
#else
  if (!device.is_cuda()) return std::nullopt;
  const c10::DeviceGuard guard(device);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return std::nullopt;
  }
  return c10::cuda::getCurrentCUDAStream(device.index()).id();
#endif
}

}  // namespace

void KeptTable::make(const TensorKind& kind, const OptimCommon& common) {
  const std::optional<int64_t> stream = table_stream(kind.device());
  if (!stream || (table_.words != nullptr && stream_ == *stream)) return;
  forget();
  if (!device_table_pays(common)) return;
  const auto options = at::TensorOptions().dtype(at::kByte).device(kind.device());
  memory_ = at::empty({device_table_bytes(common)}, options);
  check_status("optimizer", write_device_table_cuda(common, memory_.data_ptr(), table_,
                                                    current_stream(kind.device())));
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
