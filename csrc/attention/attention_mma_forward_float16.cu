#include "attention/attention_mma_forward.cuh"

namespace fused {

Status attention_mma_forward_float16(const AttentionForwardParams& params, Stream stream) {
  return launch_mma_forward<Half>(params, stream);
}

bool attention_mma_compiled() {
  return compiled_architecture<attention_mma_forward_kernel<Half, 64, false, false>>() >=
         kMmaArchitecture;
}

}  // namespace fused
