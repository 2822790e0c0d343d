// Kernels around the instructions of common/ptx.h, for tests/test_emulator_ptx.py.
#include <cstring>

#include "common/launch.h"
#include "common/ptx.h"
#include "emulator/control.h"

namespace fused::cases {

// d = a b, row-major [16, 16] [16, 8] of 16-bit elements, through shared memory and ldmatrix.
template <bool kBFloat16>
__global__ void product_16_kernel(const uint16_t* in, float* out) {
  uint16_t* tile = shared_memory<uint16_t>();  // a, then b in rows of 8
  const int lane = int(threadIdx.x), group = lane / 4, place = lane % 4;
  for (int i = lane; i < 16 * 16 + 16 * 8; i += 32) tile[i] = in[i];
  __syncwarp();

  // Matrices of a: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15. Of b, which is to come
  // transposed: rows 0-7, rows 8-15, and both once more.
  const uint16_t* row_of_a = tile + lane % 16 * 16 + lane / 16 * 8;
  const uint16_t* row_of_b = tile + 256 + lane % 16 * 8;
  uint32_t a[4], b[4];
  ptx::ldmatrix<false>(a, row_of_a);
  ptx::ldmatrix<true>(b, row_of_b);

  const uint32_t b_half[2] = {b[0], b[1]};
  const float zero[4] = {};
  float d[4];
  if (kBFloat16) {
    ptx::mma_m16n8k16_bf16(d, a, b_half, zero);
  } else {
    ptx::mma_m16n8k16_f16(d, a, b_half, zero);
  }
  for (int r = 0; r < 4; ++r) out[(group + r / 2 * 8) * 8 + place * 2 + r % 2] = d[r];
}

// d = a b + c, row-major [16, 8] [8, 8] [16, 8] of floats, one after the other.
__global__ void product_tf32_kernel(const float* in, float* out) {
  const int lane = int(threadIdx.x), group = lane / 4, place = lane % 4;
  uint32_t a[4], b[2];
  float c[4], d[4];
  for (int r = 0; r < 4; ++r) {
    a[r] = __float_as_uint(in[(group + r % 2 * 8) * 8 + place + r / 2 * 4]);
    c[r] = in[192 + (group + r / 2 * 8) * 8 + place * 2 + r % 2];
  }
  for (int r = 0; r < 2; ++r) b[r] = __float_as_uint(in[128 + (place + r * 4) * 8 + group]);
  ptx::mma_m16n8k8_tf32(d, a, b, c);
  for (int r = 0; r < 4; ++r) out[(group + r / 2 * 8) * 8 + place * 2 + r % 2] = d[r];
}

__global__ void round_to_tf32_kernel(const float* in, float* out) {
  out[threadIdx.x] = __uint_as_float(ptx::round_to_tf32(in[threadIdx.x]));
}

// Four 8 x 8 matrices to fragments and back, each way plain or transposed.
template <bool kLoadTransposed, bool kStoreTransposed>
__global__ void matrices_kernel(const uint16_t* in, uint16_t* out) {
  uint16_t* tile = shared_memory<uint16_t>();
  for (int i = int(threadIdx.x); i < 256; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t fragment[4];
  ptx::ldmatrix<kLoadTransposed>(fragment, tile + threadIdx.x * 8);
  __syncwarp();
  ptx::stmatrix<kStoreTransposed>(tile + threadIdx.x * 8, fragment);
  __syncwarp();
  for (int i = int(threadIdx.x); i < 256; i += 32) out[i] = tile[i];
}

// Three groups of one copy each: what is there before, between and after the waits.
__global__ void copies_kernel(const float4* in, float4* out) {
  float4* tile = shared_memory<float4>();
  const int thread = int(threadIdx.x);
  for (int group = 0; group < 3; ++group) {
    ptx::cp_async_16(&tile[group * 32 + thread], &in[group * 32 + thread], group == 2 ? 4 : 16);
    ptx::cp_async_commit();
  }
  for (int group = 0; group < 3; ++group) out[group * 32 + thread] = tile[group * 32 + thread];
  ptx::cp_async_wait<1>();
  for (int group = 0; group < 3; ++group) out[96 + group * 32 + thread] = tile[group * 32 + thread];
  ptx::cp_async_wait<0>();
  for (int group = 0; group < 3; ++group)
    out[192 + group * 32 + thread] = tile[group * 32 + thread];
}

__global__ void bad_misaligned_row(const uint16_t*, uint16_t* out) {
  uint32_t fragment[4];
  ptx::ldmatrix<false>(fragment, shared_memory<uint16_t>() + threadIdx.x * 8 + 1);
  out[threadIdx.x] = uint16_t(fragment[0]);
}
__global__ void bad_row_in_global_memory(const uint16_t* in, uint16_t* out) {
  uint32_t fragment[4];
  ptx::ldmatrix<false>(fragment, in);
  out[threadIdx.x] = uint16_t(fragment[0]);
}
__global__ void bad_copy_behind_the_end(const uint16_t* in, uint16_t*) {
  ptx::cp_async_16(shared_memory<uint16_t>() + 8 * (threadIdx.x + 1), in);
}

struct Case {
  const char* name;
  Status (*run)(const void* in, void* out);
};

template <auto kKernel, size_t kSharedBytes, class In, class Out>
Status run_as(void (*)(const In*, Out*), const void* in, void* out) {
  return launch(kKernel, 1, 32, kSharedBytes, nullptr, static_cast<const In*>(in),
                static_cast<Out*>(out));
}
template <auto kKernel, size_t kSharedBytes>
Status run_on(const void* in, void* out) {
  return run_as<kKernel, kSharedBytes>(kKernel, in, out);
}

const Case kCases[] = {
    {"f16", run_on<product_16_kernel<false>, 768>},
    {"bf16", run_on<product_16_kernel<true>, 768>},
    {"tf32", run_on<product_tf32_kernel, 0>},
    {"round to tf32", run_on<round_to_tf32_kernel, 0>},
    {"plain plain", run_on<matrices_kernel<false, false>, 512>},
    {"plain transposed", run_on<matrices_kernel<false, true>, 512>},
    {"transposed plain", run_on<matrices_kernel<true, false>, 512>},
    {"transposed transposed", run_on<matrices_kernel<true, true>, 512>},
    {"copies", run_on<copies_kernel, 1536>},
    {"misaligned row", run_on<bad_misaligned_row, 1024>},
    {"row in global memory", run_on<bad_row_in_global_memory, 512>},
    {"copy behind the end", run_on<bad_copy_behind_the_end, 512>},
};

}  // namespace fused::cases

extern "C" FUSED_API const char* run_ptx_case(const char* name, int order, const void* in,
                                              void* out) {
  using namespace fused;
  emulator::set_settings({emulator::Order(order), 1, 64 * 1024, 1, 80});
  for (const auto& one : cases::kCases) {
    if (std::strcmp(one.name, name) == 0) return one.run(in, out);
  }
  return "no such case";
}
