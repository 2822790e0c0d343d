// SGD on the GPU (update.cuh).
#include "optim/update.cuh"

namespace fused {

Status sgd_cuda(const SgdParams& params, Stream stream) {
  return update_cuda<SgdRule>(params, stream);
}

}  // namespace fused
