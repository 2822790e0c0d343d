// Rotary position embedding (Su et al., arXiv:2104.09864) of q and k: in every row, pairs (a, b) of
// elements turn by the angles of the row's place.
//
//   out[a] = x[a] * cos[s, i] - x[b] * sin[s, i]
//   out[b] = x[b] * cos[s, i] + x[a] * sin[s, i]      i = 0 .. R - 1
//
// a = i and b = R + i (halves, as GPT-NeoX pairs them), or a = 2 i and b = 2 i + 1 (interleaved, as
// GPT-J does). Elements behind 2 R pass as they are. With `inverse` the sines count negative, which
// gives the gradient of q and k from that of what came out: the op is linear in them. NaN and
// infinities go where this maths takes them.
//
// B = batch, H = query heads, G = key heads, S = length, D = head_dim, R = pairs, 2 R <= D.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/attention.h"
#include "common/dtype.h"
#include "common/status.h"

namespace fused {

// All heads of q and k together have at most so many elements at one place.
constexpr int32_t kMaxRotaryPlace = 1 << 22;

// q or k: [B, num_heads, S, D], read in any strides and written in others.
struct RotaryOperand {
  const void* in;
  void* out;
  HeadStrides in_strides, out_strides;
  int32_t num_heads;
};

// Cosines or sines, [B, S, R]; batch_stride 0 where all sequences share them. Rows are contiguous.
struct RotaryTable {
  const void* data;
  int64_t batch_stride, row_stride;
};

struct RotaryParams {
  RotaryOperand q, k;
  RotaryTable cos, sin;
  int32_t batch, seqlen, head_dim, num_pairs;  // batch * seqlen is an int32 too
  bool interleaved;
  bool inverse;
  DType dtype;        // of q and k
  DType table_dtype;  // theirs, or the one in which the maths is done: float, or double for double
};

static_assert(std::is_trivially_copyable_v<RotaryParams>);

Status rotary_cpu(const RotaryParams& params);
Status rotary_cuda(const RotaryParams& params, Stream stream);

}  // namespace fused
