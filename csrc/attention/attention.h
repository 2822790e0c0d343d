// Scaled dot-product attention: what the kernels compute, and everything they read or write.
//
//   x[i, j] = scale * q[i] . k[j]
//   s[i, j] = softcap * tanh(x[i, j] / softcap) - alibi_slopes[h] * |i + T - S - j| + mask[i, j]
//   p[i, j] = exp(s[i, j] - lse[i]),  lse[i] = log(exp(sink[h]) + sum_j exp(s[i, j]))
//   out[i]  = sum_j keep[i, j] * p[i, j] * v[j]        keep = 0 or 1 / (1 - dropout_p)
//
// Without softcap s begins with x, without alibi_slopes, mask or sink their term is missing. s is
// -inf where the mask, causality or the window hides j from i.
//
// A row i that sees no key has lse = -inf, out = 0 and gives no gradient, not even to the sink. NaN
// and infinities in the inputs go where this maths takes them.
//
// In forward mode each input x has a tangent x' besides, and the same pass gives the tangents of
// the results, zeros for a row without keys:
//
//   s'[i, j] = scale * (1 - tanh^2) * (q'[i] . k[j] + q[i] . k'[j])
//              - alibi_slopes'[h] * |i + T - S - j| + mask'[i, j]        0 where j is hidden
//   lse'[i]  = sum_j p[i, j] * s'[i, j] + exp(sink[h] - lse[i]) * sink'[h]
//   out'[i]  = sum_j keep[i, j] * p[i, j] * (s'[i, j] * v[j] + v'[j]) - lse'[i] * out[i]
//
// B = batch, S = query length, T = key length, H = query heads, G = key/value heads (H is a
// multiple of G), D = head_dim of q and k, Dv = head_dim of v.
//
// Sequences of their own lengths lie packed, one behind the other, in tensors of batch 1 whose S
// and T are the rows of all: sequence b has the queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1,
// and keys likewise. Above, S, T, i and j are then its own; attention_sequence.h tells them. Rows
// behind the last sequence see nothing and give no gradient.
//
// A cache has room for T keys and values of each sequence, of which it holds cache_seqlens[b] and
// num_new_keys; T above is then that. Row j lies in [B, G, T, D], or, of [pages, G, page_size, D],
// in page block_table[b, j / page_size]. Forward only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/status.h"

namespace fused {

constexpr int32_t kMaxHeadDim = 512;
constexpr int32_t kMaxLength = 1 << 30;  // a length and a tile's size add up to an int32

// In elements; the last dimension is contiguous.
struct HeadStrides {
  int64_t batch, head, row;
};

enum class MaskKind : int8_t { kNone, kBool, kAdditive };

// A mask of shape [B, H, S, T] in which broadcast dimensions have stride 0. One for packed
// sequences has rows and columns for the longest; what lies beyond them is hidden.
struct AttentionMask {
  const void* data;
  int64_t batch_stride, head_stride, row_stride, column_stride;
  int32_t rows, columns;  // kMaxLength along a broadcast dimension
  MaskKind kind;
  DType dtype;  // of an additive mask
};

// A number in both precisions: no kernel that computes in float shall convert a double, for which
// most GPUs have a 64th of float's units.
struct Scalar {
  template <typename A>
  FUSED_HOST_DEVICE A as() const {
    if constexpr (std::is_same_v<A, double>) {
      return in_double;
    } else {
      return in_float;
    }
  }

  double in_double;
  float in_float;
};
inline Scalar scalar(double value) { return {value, static_cast<float>(value)}; }

// What the forward and the backward pass share.
struct AttentionProblem {
  const void* q;  // [B, H, S, D]
  const void* k;  // [B, G, T, D]
  const void* v;  // [B, G, T, Dv]
  HeadStrides q_strides, k_strides, v_strides;
  AttentionMask mask;
  const void* maybe_alibi_slopes;  // [H], float (double for double)
  const void* maybe_sink;          // [H], float (double for double)
  const int64_t* maybe_rng;  // [2]: seed and offset of the dropout mask, on the tensors' device
  // [num_sequences + 1], rising from 0, on the tensors' device; both or neither.
  const int32_t* maybe_cu_seqlens_q;
  const int32_t* maybe_cu_seqlens_k;
  int32_t batch, num_heads, num_heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
  int32_t num_sequences;  // batch, or how many are packed
  // Of a cache, on the tensors' device; without them all T keys are there, and side by side.
  const int32_t* maybe_cache_seqlens;  // [B]
  const int32_t* maybe_block_table;    // [B, pages_of_sequence]
  int32_t num_new_keys, page_size, pages_of_sequence;
  int32_t window_left, window_right;  // row i sees the keys around i + T - S; -1: no bound
  uint32_t drop_threshold;  // an element is dropped where its 32 random bits are below this
  Scalar scale;             // multiplies q . k
  Scalar softcap;           // 0: none
  Scalar keep_scale;        // 1 / (1 - dropout_p), 0 where everything is dropped
  bool causal;              // row i sees the keys 0 .. i, as torch aligns it
  bool allow_tf32;          // CUDA kernels may round the factors of float32 products to tf32
  DType dtype;
};

struct AttentionForwardParams : AttentionProblem {
  void* out;  // [B, H, S, Dv]
  void* lse;  // [B, H, S] contiguous, float (double for double)
  // [2, B, H, S] contiguous, like lse: each row's largest score, the sink among them, and
  // 1 / sum(exp(score - largest)), from which p comes out as exactly again as it was; zeros for a
  // row without keys. exp(s - lse) would lose what digits a large lse has no room for.
  void* row_stats;
  void* maybe_partials;  // scratch on CUDA, like lse: attention_split.h says when and how much
  HeadStrides out_strides;
};

struct AttentionTangentParams : AttentionForwardParams {
  // The same problem with the tangents of q, k, v, mask, slopes and sink in their place, each null
  // where it is zero, and without a softcap: final scores are made alike of both.
  AttentionProblem tangents;
  void* out_tangent;  // [B, H, S, Dv]
  void* lse_tangent;  // [B, H, S] contiguous, like lse
  HeadStrides out_tangent_strides;
};

// A tensor of a mask's shape that takes the sum of ds over each dimension of stride 0.
struct ScoreGradient {
  void* data;  // float (double for double)
  int64_t batch_stride, head_stride, row_stride, column_stride;
  void* maybe_partials;  // scratch on CUDA, like data: attention_score_parts.h says when, how much
};

// Gradients that are null are not wanted; grad_k and grad_v come together.
struct AttentionBackwardParams : AttentionProblem {
  const void* out;             // [B, H, S, Dv], as the forward pass left it
  const void* grad_out;        // [B, H, S, Dv]
  const void* row_stats;       // [2, B, H, S] contiguous, as the forward pass left them
  const void* maybe_grad_lse;  // [B, H, S] contiguous, float (double for double)
  void* delta;  // [B, H, S] contiguous, like grad_lse: scratch, sum(grad_out * out) - grad_lse
  void* maybe_grad_q;  // [B, H, S, D]
  void* maybe_grad_k;  // [B, G, T, D]
  void* maybe_grad_v;  // [B, G, T, Dv]
  HeadStrides out_strides, grad_out_strides, grad_q_strides, grad_k_strides, grad_v_strides;
  ScoreGradient maybe_grad_mask;  // data may be null
  void* maybe_grad_alibi_slopes;  // [H], like grad_lse
  void* maybe_row_alibi;          // [B, H, S] contiguous, like grad_lse: scratch, by row
  void* maybe_grad_sink;          // [H], like grad_lse
};

static_assert(std::is_trivially_copyable_v<AttentionBackwardParams>);
static_assert(std::is_trivially_copyable_v<AttentionTangentParams>);
static_assert(sizeof(AttentionBackwardParams) <= 1024 && sizeof(AttentionTangentParams) <= 1024,
              "kernel arguments hold at most 4 KB");

// Why no kernel can run this problem, or nullptr. Every launcher runs what passes here.
inline const char* attention_unsupported(const AttentionProblem& problem) {
  if (problem.head_dim < 1 || problem.head_dim_v < 1) return "no kernel for an empty head_dim";
  if (problem.head_dim > kMaxHeadDim) return "no kernel for head_dim above 512";
  if (problem.head_dim_v > kMaxHeadDim) return "no kernel for a value head_dim above 512";
  if (problem.seqlen_q > kMaxLength) return "no kernel for a length of q above 2^30";
  if (problem.seqlen_k > kMaxLength) return "no kernel for a length of k above 2^30";
  if (problem.num_sequences > kMaxLength) return "no kernel for more than 2^30 sequences";
  return nullptr;
}

// What head dims had better be multiples of, padded with zeros; 1 if this problem is well as it is.
inline int32_t attention_pad_multiple_cpu(const AttentionProblem&) { return 1; }
int32_t attention_pad_multiple_cuda(const AttentionForwardParams& params, Stream);
int32_t attention_pad_multiple_cuda(const AttentionBackwardParams& params, Stream);

Status attention_forward_cpu(const AttentionForwardParams& params);
Status attention_forward_cuda(const AttentionForwardParams& params, Stream stream);
Status attention_tangent_cpu(const AttentionTangentParams& params);
Status attention_tangent_cuda(const AttentionTangentParams& params, Stream stream);
Status attention_backward_cpu(const AttentionBackwardParams& params);
Status attention_backward_cuda(const AttentionBackwardParams& params, Stream stream);

}  // namespace fused
