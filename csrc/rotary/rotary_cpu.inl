// Rotary embedding on the CPU, included once per instruction set. See rotary.h.
//
// A row of the table is widened once, its sines turned where the rotation is the inverse one, and
// serves all heads of q and k at that place. The loops over pairs are branch-free, so that g++
// vectorises them whole, conversions from and to the 16-bit types included.

template <typename A>
static void rotary_widen(const RotaryTable& table, const RotaryParams& p, int64_t row, A sign,
                         A* out) {
  const int64_t offset = row / p.seqlen * table.batch_stride + row % p.seqlen * table.row_stride;
  visit_dtype(p.table_dtype, [&](auto zero) {
    const auto* in = static_cast<const decltype(zero)*>(table.data) + offset;
    for (int32_t i = 0; i < p.num_pairs; ++i) out[i] = sign * static_cast<A>(load(in[i]));
  });
}

// Asks for the next row of a head while this one turns. A row is a few cache lines between others
// that nobody reads, which the CPU's own prefetchers do not see through: 8 x 256 rows of 2 x 8
// heads of 64 in float32 take 260 instead of 466 us on one Zen 5 core, a copy of them 226.
template <typename T>
static void rotary_prefetch(const T* in, const T* out, int64_t head_dim) {
  prefetch(in, head_dim * sizeof(T));
  prefetch(out, head_dim * sizeof(T));
}

template <typename T, bool kInterleaved>
static void rotary_heads(const RotaryOperand& x, const RotaryParams& p, int64_t row,
                         const Accumulator<T>* cos, const Accumulator<T>* sin) {
  using A = Accumulator<T>;
  const int64_t batch = row / p.seqlen, place = row % p.seqlen;
  const int64_t pairs = p.num_pairs, turned = 2 * pairs;
  const size_t rest = static_cast<size_t>(p.head_dim - turned) * sizeof(T);
  const T* in_row =
      static_cast<const T*>(x.in) + batch * x.in_strides.batch + place * x.in_strides.row;
  T* out_row = static_cast<T*>(x.out) + batch * x.out_strides.batch + place * x.out_strides.row;
  for (int64_t head = 0; head < x.num_heads; ++head) {
    const T* in = in_row + head * x.in_strides.head;
    T* out = out_row + head * x.out_strides.head;
    rotary_prefetch(in + x.in_strides.row, out + x.out_strides.row, p.head_dim);
#pragma GCC ivdep
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t a = kInterleaved ? 2 * i : i, b = kInterleaved ? 2 * i + 1 : pairs + i;
      const A first = load(in[a]), second = load(in[b]);
      out[a] = store<T>(first * cos[i] - second * sin[i]);
      out[b] = store<T>(second * cos[i] + first * sin[i]);
    }
    if (rest > 0) memcpy(out + turned, in + turned, rest);
  }
}

static void rotary_rows(const RotaryParams& p, int64_t begin, int64_t end) {
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const Scratch<A> angles(2 * int64_t{p.num_pairs});
    A* cos = angles.data();
    A* sin = cos + p.num_pairs;
    for (int64_t row = begin; row < end; ++row) {
      rotary_widen(p.cos, p, row, A(1), cos);
      rotary_widen(p.sin, p, row, A(p.inverse ? -1 : 1), sin);
      for (const RotaryOperand* x : {&p.q, &p.k}) {
        if (p.interleaved) {
          rotary_heads<T, true>(*x, p, row, cos, sin);
        } else {
          rotary_heads<T, false>(*x, p, row, cos, sin);
        }
      }
    }
  });
}
