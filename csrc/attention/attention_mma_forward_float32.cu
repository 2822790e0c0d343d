#include "attention/attention_mma_forward.cuh"

namespace fused {

Status attention_mma_forward_float32(const AttentionForwardParams& params, Stream stream) {
  return launch_mma_forward<float>(params, stream);
}

}  // namespace fused
