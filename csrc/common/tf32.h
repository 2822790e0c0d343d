// Whether products of float32 may round their factors to tf32, of 10 bits behind the point. For the
// glue, which knows torch.
#pragma once

#include <ATen/Context.h>

#include "common/dispatch.h"

namespace fused {

// As cuBLAS decides it for matrix products (MATMUL) and cuDNN for convolutions (CONV). Of the
// context's ways to say so this is the one that the older flags write as well; the older questions
// raise where somebody used both.
inline bool may_round_to_tf32(const at::Tensor& factor, at::Float32Op op) {
  return factor.scalar_type() == at::kFloat && runs_on_cuda(factor) &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, op) ==
             at::Float32Precision::TF32;
}

}  // namespace fused
