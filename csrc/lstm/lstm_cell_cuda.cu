// Chooses the instance of an LSTM cell kernel and launches it.
#include <initializer_list>

#include "lstm/lstm_cell_backward.cuh"
#include "lstm/lstm_cell_forward.cuh"

namespace fused {

Status lstm_cell_forward_cuda(const LstmCellForwardParams& p, Stream stream) {
  return visit_dtype(p.dtype, [&](auto zero) -> Status {
    using T = decltype(zero);
    constexpr int kPack = kLstmPack<T>;
    const bool packed =
        p.hidden_size % kPack == 0 &&
        on_boundary(kPack * sizeof(T), {p.gates, p.maybe_bias_ih, p.maybe_bias_hh, p.c_prev,
                                        p.c_next, p.h_next, p.maybe_c_copy, p.maybe_h_copy});
    const dim3 grid(lstm_blocks(p.batch, p.hidden_size, packed ? kPack : 1));
    return launch(packed ? lstm_cell_forward_kernel<T, kPack> : lstm_cell_forward_kernel<T, 1>,
                  grid, dim3(kLstmThreads), 0, stream, p);
  });
}

Status lstm_cell_backward_cuda(const LstmCellBackwardParams& p, Stream stream) {
  return visit_dtype(p.dtype, [&](auto zero) -> Status {
    using T = decltype(zero);
    constexpr int kPack = kLstmPack<T>;
    const bool packed =
        p.hidden_size % kPack == 0 &&
        on_boundary(kPack * sizeof(T), {p.gates, p.c_prev, p.maybe_grad_h, p.maybe_grad_output,
                                        p.maybe_grad_c, p.grad_gates, p.grad_c_prev});
    const dim3 grid(lstm_blocks(p.batch, p.hidden_size, packed ? kPack : 1));
    return launch(packed ? lstm_cell_backward_kernel<T, kPack> : lstm_cell_backward_kernel<T, 1>,
                  grid, dim3(kLstmThreads), 0, stream, p);
  });
}

}  // namespace fused
