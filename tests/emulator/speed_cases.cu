// What the emulator takes for what kernels do most, for benchmarks/bench_emulator.py.
#include "common/launch.h"
#include "common/ptx.h"
#include "emulator/control.h"

namespace fused::cases {

__global__ void products_kernel(int count, float* out) {
  const uint32_t a[4] = {}, b[2] = {};
  float sums[4] = {};
  for (int i = 0; i < count; ++i) ptx::mma_m16n8k16_f16(sums, a, b, sums);
  out[threadIdx.x] = sums[0];
}

__global__ void barrier_kernel() { __syncthreads(); }

void forward_order() { emulator::set_settings({emulator::Order::kForward, 0, 64 * 1024, 1, 80}); }

}  // namespace fused::cases

using namespace fused;

// `count` tensor-core products of one warp, one after the other.
extern "C" FUSED_API const char* run_products(int count) {
  cases::forward_order();
  float out[32];
  return launch(cases::products_kernel, 1, 32, 0, nullptr, count, static_cast<float*>(out));
}

// `count` blocks of 256 threads that meet at one barrier.
extern "C" FUSED_API const char* run_blocks(int count) {
  cases::forward_order();
  return launch(cases::barrier_kernel, static_cast<unsigned>(count), 256, 0, nullptr);
}
