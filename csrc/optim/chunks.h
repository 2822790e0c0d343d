// How kernels cut tensors for their blocks and threads, the same on every backend.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fused {

// Elements of a chunk: a multiple of every dtype's packs of 16 bytes times the threads of a block,
// and of every vector width, so that a chunk of an aligned tensor starts aligned and only a
// tensor's last chunk has a remainder. Large enough that finding the chunk and the power of two
// betas cost little beside it, small enough that a few million elements fill a GPU.
// Not yet measured on a GPU.
constexpr int64_t kOptimChunk = 8192;

FUSED_HOST_DEVICE int64_t num_chunks(int64_t numel) {
  return (numel + kOptimChunk - 1) / kOptimChunk;
}

template <typename Tensor>
int64_t num_chunks(const Tensor* tensors, int64_t num_tensors) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_tensors; ++i) count += num_chunks(tensors[i].numel);
  return count;
}

}  // namespace fused
