// The CPU's matrix products around the LSTM kernels: C (+)= A B with B packed once, as for the
// recurrent weights of a whole sequence.
//
// The library's are used everywhere else. Of products of 2048 x 256 x 1024 on one Zen 5 core (torch
// 2.13): float32 93 GFLOP/s by torch.mm, 215 here; float16 19, and 2 where an operand is
// transposed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace fused {

// A strided matrix of `dtype` (any but float64): element (i, j) at data[i * stride0 + j * stride1].
struct CpuMatrix {
  const void* data;
  int64_t stride0, stride1;
  DType dtype;
};

// Bytes that a packed B [k, n] takes.
int64_t packed_size_cpu(DType dtype, int64_t k, int64_t n);
void pack_cpu(const CpuMatrix& b, int64_t k, int64_t n, void* packed);

struct CpuProductParams {
  CpuMatrix a;         // [m, k]
  const void* packed;  // B [k, n] of a's dtype, packed
  void* c;             // [m, n], rows `row_stride_c` apart, of a's dtype
  int64_t row_stride_c;
  int64_t m, n, k;
  bool accumulate;  // C += instead of C =
};
static_assert(std::is_trivially_copyable_v<CpuProductParams>);

// Sums in float, in an order that the number of threads does not change.
void product_cpu(const CpuProductParams& params);

}  // namespace fused
