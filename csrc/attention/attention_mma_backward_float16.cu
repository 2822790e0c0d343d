#include "attention/attention_mma_backward.cuh"

namespace fused {

Status attention_mma_backward_float16(const AttentionBackwardParams& params, Stream stream) {
  return launch_mma_backward<Half>(params, stream);
}

}  // namespace fused
