#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "lstm/lstm.h"

#define FUSED_CPU_KERNELS "lstm/lstm_cell_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {
namespace {

// Starting a second thread costs about what 4096 hidden elements do (float32, AVX-512).
constexpr int64_t kElementsPerThread = 4096;

template <typename Params, typename Rows>
Status over_rows(const Params& params, const Rows& rows) {
  const int64_t hidden = params.hidden_size > 0 ? params.hidden_size : 1;
  const int64_t grain = kElementsPerThread / hidden + 1;
  parallel_for(0, params.batch, grain, rows);
  return nullptr;
}

}  // namespace

Status lstm_cell_forward_cpu(const LstmCellForwardParams& params) {
  return over_rows(params, [&](int64_t begin, int64_t end) {
    FUSED_ISA_DISPATCH(lstm_cell_forward, params, begin, end);
  });
}

Status lstm_cell_backward_cpu(const LstmCellBackwardParams& params) {
  return over_rows(params, [&](int64_t begin, int64_t end) {
    FUSED_ISA_DISPATCH(lstm_cell_backward, params, begin, end);
  });
}

}  // namespace fused
