// SGD on the CPU.
#include "optim/update_cpu.h"

namespace fused {

Status sgd_cpu(const SgdParams& params) { return update_cpu<SgdRule>(params); }

}  // namespace fused
