// Adam and AdamW on the CPU.
#include "optim/update_cpu.h"

namespace fused {

Status adam_cpu(const AdamParams& params) { return update_cpu<AdamRule>(params); }

}  // namespace fused
