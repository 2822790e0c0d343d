#include "attention/attention_mma_backward.cuh"

namespace fused {

Status attention_mma_backward_bfloat16(const AttentionBackwardParams& params, Stream stream) {
  return launch_mma_backward<BFloat16>(params, stream);
}

}  // namespace fused
