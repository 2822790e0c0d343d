// The gradient through the activation, one pass over memory, before the convolution's own
// gradients.

// One row of the innermost axis at a time, whatever the strides are.
template <typename T>
static void activation_backward(const ConvActivationBackwardParams& p) {
  using A = Accumulator<T>;
  // Along the axis that is dense in the result: the channels of channels-last tensors, else width.
  const bool by_channel = p.grad_pre_stride.channel == 1 && p.channels > 1;
  const int64_t count = by_channel ? p.channels : p.size[2];
  const int64_t other = by_channel ? p.size[2] : p.channels;
  const int64_t rows = int64_t{p.batch} * p.size[0] * p.size[1] * other;
  const auto inner = [&](const ConvStrides& s) { return by_channel ? s.channel : s.space[2]; };
  constexpr int64_t kPiece = 1024;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, count));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    Scratch<A> grad(kPiece), saved(kPiece);
    for (int64_t row = begin; row < end; ++row) {
      // Rows in the order of memory.
      int64_t index = row, n, channel = 0, x = 0;
      if (by_channel) x = index % other, index /= other;
      const int64_t y = index % p.size[1];
      index /= p.size[1];
      const int64_t z = index % p.size[0];
      index /= p.size[0];
      if (!by_channel) channel = index % other, index /= other;
      n = index;
      const auto offset = [&](const ConvStrides& s) {
        return n * s.outer + channel * s.channel + z * s.space[0] + y * s.space[1] + x * s.space[2];
      };
      const T* from = static_cast<const T*>(p.grad_output) + offset(p.grad_output_stride);
      const T* kept = static_cast<const T*>(p.saved) + offset(p.saved_stride);
      T* out = static_cast<T*>(p.grad_pre) + offset(p.grad_pre_stride);
      const int64_t from_step = inner(p.grad_output_stride), kept_step = inner(p.saved_stride);
      const int64_t out_step = inner(p.grad_pre_stride);
      for (int64_t i = 0; i < count; i += kPiece) {
        const int64_t n_piece = std::min(kPiece, count - i);
        pack_row(grad.data(), n_piece, from, from_step, i, 1, count);
        pack_row(saved.data(), n_piece, kept, kept_step, i, 1, count);
        activate_backward(p.activation, grad.data(), saved.data(), n_piece);
        store_row(out + i * out_step, out_step, grad.data(), n_piece);
      }
    }
  });
}
