// One element of the score matrix: mask, causality and dropout, the same on every backend.
#pragma once

#include "attention/attention.h"
#include "common/philox.h"

namespace fused {

// The keys that row `row` can see end here.
FUSED_HOST_DEVICE int32_t visible_keys(const AttentionProblem& problem, int32_t row) {
  return problem.causal && row + 1 < problem.seqlen_k ? row + 1 : problem.seqlen_k;
}

// The first row that can see key `column`.
FUSED_HOST_DEVICE int32_t first_row_seeing(const AttentionProblem& problem, int32_t column) {
  return problem.causal ? column : 0;
}

template <typename A>
FUSED_HOST_DEVICE A load_mask(const AttentionMask& mask, int64_t offset) {
  switch (mask.dtype) {
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(mask.data)[offset]);
    case DType::kFloat16:
      return static_cast<A>(load(static_cast<const Half*>(mask.data)[offset]));
    case DType::kBFloat16:
      return static_cast<A>(load(static_cast<const BFloat16*>(mask.data)[offset]));
    case DType::kFloat32:
      break;
  }
  return static_cast<A>(static_cast<const float*>(mask.data)[offset]);
}

// The score of an element inside the matrix, given q . k: scaled, masked, -inf where hidden.
template <typename A>
FUSED_HOST_DEVICE A masked_score(const AttentionProblem& problem, int32_t batch, int32_t head,
                                 int32_t row, int32_t column, A dot) {
  const A kHidden = -static_cast<A>(__builtin_huge_val());
  if (problem.causal && column > row) return kHidden;
  const A score = dot * static_cast<A>(problem.scale);
  const AttentionMask& mask = problem.mask;
  if (mask.kind == MaskKind::kNone) return score;
  const int64_t offset = batch * mask.batch_stride + head * mask.head_stride +
                         row * mask.row_stride + column * mask.column_stride;
  if (mask.kind == MaskKind::kBool) {
    return static_cast<const bool*>(mask.data)[offset] ? score : kHidden;
  }
  return score + load_mask<A>(mask, offset);
}

// What dropout multiplies element (batch, head, row, column) of p by: a pure function of its place
// and of (seed, offset). One Philox call gives the bits of four neighbouring columns.
template <typename A>
FUSED_HOST_DEVICE A dropout_scale(const AttentionProblem& problem, int32_t batch, int32_t head,
                                  int32_t row, int32_t column) {
  const uint64_t seed = static_cast<uint64_t>(problem.maybe_rng[0]);
  const uint64_t offset = static_cast<uint64_t>(problem.maybe_rng[1]);
  const uint32_t head_of_batch =
      static_cast<uint32_t>(batch) * static_cast<uint32_t>(problem.num_heads) +
      static_cast<uint32_t>(head);
  const uint64_t key = seed ^ (offset & 0xffffffff00000000ull);
  const Philox4 random =
      philox4x32_10(key, Philox4{static_cast<uint32_t>(column) / 4, static_cast<uint32_t>(row),
                                 head_of_batch, static_cast<uint32_t>(offset)});
  const uint32_t bits = column % 4 == 0   ? random.x
                        : column % 4 == 1 ? random.y
                        : column % 4 == 2 ? random.z
                                          : random.w;
  return bits < problem.drop_threshold ? A(0) : static_cast<A>(problem.keep_scale);
}

}  // namespace fused
