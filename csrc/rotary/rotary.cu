// Rotary embedding on the GPU: one launch for q and k. The formula is in rotary.h.
//
// A thread owns 2 N elements of one row of one head: N pairs that it turns, or, behind those, what
// passes. Halves of N pairs lie R apart, neighbours side by side: two accesses of N elements either
// way, of 16 bytes each where N is more than 1. Blocks are two-dimensional: x goes over the heads
// of q, then those of k, and the units of each, which lie in memory side by side; y over rows, as
// many as fill a block. Every element is read and written once; the table comes from the cache but
// for its first head.
#include <initializer_list>

#include "common/launch.h"
#include "common/vector_load.cuh"
#include "rotary/rotary.h"

namespace fused {
namespace {

constexpr int kRotaryThreads = 128;
static_assert(kMaxRotaryPlace / kRotaryThreads < 65536, "a grid's y goes no further");

FUSED_HOST_DEVICE int32_t divide_up(int32_t a, int32_t b) { return a / b + (a % b != 0); }

// How many threads a row of a head takes: those that turn pairs come first.
FUSED_HOST_DEVICE int32_t units_that_turn(const RotaryParams& p, int n) { return p.num_pairs / n; }
FUSED_HOST_DEVICE int32_t units_of_head(const RotaryParams& p, int n) {
  return units_that_turn(p, n) + divide_up(p.head_dim - 2 * p.num_pairs, 2 * n);
}

FUSED_HOST_DEVICE int64_t offset_of(const HeadStrides& s, int64_t batch, int64_t head,
                                    int64_t row) {
  return batch * s.batch + head * s.head + row * s.row;
}

template <typename Table>
__device__ __forceinline__ const Table* table_row(const RotaryTable& table, int64_t batch,
                                                  int64_t place) {
  return static_cast<const Table*>(table.data) + batch * table.batch_stride +
         place * table.row_stride;
}

template <typename T, typename Table, int N>
__device__ __forceinline__ void rotary_turn(const RotaryParams& p, const T* in, T* out,
                                            const Table* cos_row, const Table* sin_row,
                                            int32_t pair) {
  using A = Accumulator<T>;
  const int32_t first = p.interleaved ? 2 * pair : pair;
  const int32_t second = p.interleaved ? first + N : p.num_pairs + pair;
  A x[2 * N], cos[N], sin[N];
  load_widened<T, N>(in + first, x);
  load_widened<T, N>(in + second, x + N);
  load_widened<Table, N>(cos_row + pair, cos);
  load_widened<Table, N>(sin_row + pair, sin);
  const auto turn = [&](A& a, A& b, int i) {
    const A before = a, angle = p.inverse ? -sin[i] : sin[i];
    a = before * cos[i] - b * angle;
    b = b * cos[i] + before * angle;
  };
  if (p.interleaved) {
#pragma unroll
    for (int i = 0; i < N; ++i) turn(x[2 * i], x[2 * i + 1], i);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) turn(x[i], x[N + i], i);
  }
  store_narrowed<T, N>(out + first, x);
  store_narrowed<T, N>(out + second, x + N);
}

template <typename T, int N>
__device__ __forceinline__ void rotary_pass(const RotaryParams& p, const T* in, T* out,
                                            int32_t column) {
#pragma unroll
  for (int c = 0; c < 2 * N; c += N) {
    if (column + c < p.head_dim) store_pack(out + column + c, load_pack<T, N>(in + column + c));
  }
}

template <typename T, typename Table, int N>
__global__ void __launch_bounds__(kRotaryThreads) rotary_kernel(const RotaryParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int32_t index = blockIdx.y * blockDim.x + threadIdx.x;  // over the units of all heads
  const int32_t units = units_of_head(p, N), head_of_both = index / units, unit = index % units;
  if (row >= p.batch * p.seqlen || head_of_both >= p.q.num_heads + p.k.num_heads) return;

  const bool is_q = head_of_both < p.q.num_heads;
  const RotaryOperand& x = is_q ? p.q : p.k;
  const int32_t head = is_q ? head_of_both : head_of_both - p.q.num_heads;
  const int32_t batch = static_cast<int32_t>(row) / p.seqlen;
  const int32_t place = static_cast<int32_t>(row) % p.seqlen;
  const T* in = static_cast<const T*>(x.in) + offset_of(x.in_strides, batch, head, place);
  T* out = static_cast<T*>(x.out) + offset_of(x.out_strides, batch, head, place);
  const int32_t turning = units_that_turn(p, N);
  if (unit < turning) {
    const Table* cos = table_row<Table>(p.cos, batch, place);
    const Table* sin = table_row<Table>(p.sin, batch, place);
    rotary_turn<T, Table, N>(p, in, out, cos, sin, unit * N);
  } else {
    rotary_pass<T, N>(p, in, out, 2 * (p.num_pairs + (unit - turning) * N));
  }
}

bool on_16_bytes(const void* data, std::initializer_list<int64_t> strides, int64_t element_size) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) aligned = aligned && stride * element_size % 16 == 0;
  return aligned;
}

// Whether every access of N elements, N those of 16 bytes, begins on its boundary.
template <typename T, typename Table>
bool can_pack(const RotaryParams& p) {
  const auto aligned = [&](const void* data, const HeadStrides& strides, int32_t heads) {
    // The stride of the one sequence or head that there is leads nowhere.
    const int64_t batch = p.batch > 1 ? strides.batch : 0, head = heads > 1 ? strides.head : 0;
    const int64_t row = p.seqlen > 1 ? strides.row : 0;
    return on_16_bytes(data, {batch, head, row}, sizeof(T));
  };
  const auto operand_aligned = [&](const RotaryOperand& x) {
    return aligned(x.in, x.in_strides, x.num_heads) && aligned(x.out, x.out_strides, x.num_heads);
  };
  const auto table_aligned = [](const RotaryTable& table) {
    return on_16_bytes(table.data, {table.batch_stride, table.row_stride}, sizeof(Table));
  };
  constexpr int kPack = Pack<T>::kSize;
  return p.num_pairs % kPack == 0 && p.head_dim % kPack == 0 && operand_aligned(p.q) &&
         operand_aligned(p.k) && table_aligned(p.cos) && table_aligned(p.sin);
}

template <typename T, typename Table, int N>
Status launch_rotary(const RotaryParams& p, Stream stream) {
  const int32_t units = units_of_head(p, N) * (p.q.num_heads + p.k.num_heads);
  const int32_t blocks = divide_up(units, kRotaryThreads);
  const int32_t width = divide_up(units, blocks), height = kRotaryThreads / width;
  const dim3 grid(divide_up(p.batch * p.seqlen, height), blocks);
  return launch(rotary_kernel<T, Table, N>, grid, dim3(width, height), 0, stream, p);
}

}  // namespace

Status rotary_cuda(const RotaryParams& p, Stream stream) {
  return visit_dtype(p.dtype, [&](auto zero) -> Status {
    using T = decltype(zero);
    const auto with_table = [&](auto table_zero) -> Status {
      using Table = decltype(table_zero);
      return can_pack<T, Table>(p) ? launch_rotary<T, Table, Pack<T>::kSize>(p, stream)
                                   : launch_rotary<T, Table, 1>(p, stream);
    };
    return p.table_dtype == p.dtype ? with_table(T{}) : with_table(Accumulator<T>{});
  });
}

}  // namespace fused
