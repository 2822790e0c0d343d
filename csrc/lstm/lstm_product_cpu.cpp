#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "lstm/lstm_product.h"

#if FUSED_X86
#include <immintrin.h>
#endif

#define FUSED_MULTIPLIES_BFLOAT16 1
#define FUSED_CPU_KERNELS "lstm/lstm_product_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {
namespace {

// Multiplications that are worth a second thread: some microseconds' work.
constexpr int64_t kSmallProduct = 1 << 17;
// Elements to pack that are.
constexpr int64_t kSmallCopy = 1 << 15;

}  // namespace

int64_t packed_size_cpu(DType dtype, int64_t k, int64_t n) {
  return FUSED_ISA_DISPATCH(product_packed_size, dtype, k, n);
}

void pack_cpu(const CpuMatrix& b, int64_t k, int64_t n, void* packed) {
  const int64_t stripes = FUSED_ISA_DISPATCH(product_stripes, n);
  parallel_for(0, stripes, kSmallCopy / (k * n / stripes + 1) + 1, [&](int64_t begin, int64_t end) {
    FUSED_ISA_DISPATCH(product_pack, b, k, n, packed, begin, end);
  });
}

void product_cpu(const CpuProductParams& p) {
  constexpr int64_t kRows = 64;  // kRowBlock, the same for every instruction set
  const int64_t row_blocks = (p.m + kRows - 1) / kRows;
  const int64_t stripes = FUSED_ISA_DISPATCH(product_stripes, p.n);
  const bool small = p.m * p.n * p.k < kSmallProduct;
  // Too few blocks of rows for the threads, as in one step of a recurrence: columns are split too.
  const int64_t threads = small ? 1 : num_threads();
  const int64_t groups = std::max<int64_t>(1, std::min(stripes, threads / row_blocks));
  const int64_t tasks = row_blocks * groups;
  parallel_for(0, tasks, small ? tasks : 1, [&](int64_t begin, int64_t end) {
    FUSED_ISA_DISPATCH(product_tasks, p, groups, begin, end);
  });
}

}  // namespace fused
