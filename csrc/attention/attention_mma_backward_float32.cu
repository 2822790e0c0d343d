#include "attention/attention_mma_backward.cuh"

namespace fused {

Status attention_mma_backward_float32(const AttentionBackwardParams& params, Stream stream) {
  return launch_mma_backward<float>(params, stream);
}

}  // namespace fused
