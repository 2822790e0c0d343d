// The gradient through the activation, one pass over memory, before the convolution's own
// gradients.

template <typename T>
static void activation_backward(const ConvActivationBackwardParams& p) {
  using A = Accumulator<T>;
  const auto axis = [&](int64_t count, const auto& of) {
    return BoxAxis<3>{count, {of(p.grad_output_stride), of(p.saved_stride), of(p.grad_pre_stride)}};
  };
  const BoxAxis<3> image = axis(p.batch, [](const ConvStrides& s) { return s.outer; });
  const BoxAxis<3> channel = axis(p.channels, [](const ConvStrides& s) { return s.channel; });
  BoxAxis<3> space[3];
  for (int i = 0; i < 3; ++i) {
    space[i] = axis(p.size[i], [&](const ConvStrides& s) { return s.space[i]; });
  }
  // In the order of the result's memory.
  const bool by_channel = p.grad_pre_stride.channel == 1;
  const Box<3> box = collapse<3>(by_channel ? Box<3>{image, space[0], space[1], space[2], channel}
                                            : Box<3>{image, channel, space[0], space[1], space[2]});
  constexpr int64_t kPiece = 1024;
  const auto& [count, stride] = box[4];
  const int64_t pieces = ceil_div(count, kPiece);
  const int64_t all = pieces * box[0].count * box[1].count * box[2].count * box[3].count;
  const int64_t grain = ceil_div(16384, std::min(kPiece, count));
  parallel_for(0, all, grain, [&](int64_t begin, int64_t end) {
    const Scratch<A> grad(kPiece), saved(kPiece);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % pieces * kPiece, n = std::min(kPiece, count - first);
      int64_t offset[3] = {first * stride[0], first * stride[1], first * stride[2]};
      for (int64_t rest = index / pieces, i = 3; i >= 0; rest /= box[i].count, --i) {
        for (int t = 0; t < 3; ++t) offset[t] += rest % box[i].count * box[i].stride[t];
      }
      const T* from = static_cast<const T*>(p.grad_output) + offset[0];
      const T* kept = static_cast<const T*>(p.saved) + offset[1];
      pack_row(grad.data(), n, from, stride[0], 0, 1, n);
      pack_row(saved.data(), n, kept, stride[1], 0, 1, n);
      activate_backward(p.activation, grad.data(), saved.data(), n);
      store_row(static_cast<T*>(p.grad_pre) + offset[2], stride[2], grad.data(), n);
    }
  });
}
