#include "attention/attention_mma_forward.cuh"

namespace fused {

Status attention_mma_forward_bfloat16(const AttentionForwardParams& params, Stream stream) {
  return launch_mma_forward<BFloat16>(params, stream);
}

}  // namespace fused
