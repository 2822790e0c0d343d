// The instructions of common/ptx.h, where their layouts are described, as collectives of a warp and
// as copies that land as late as they may.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "emulator/warp.h"

namespace fused::emulator {

inline float exp2_approx(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;  // NaN stays
}

inline uint32_t round_to_tf32(float x) {
  if (std::isnan(x)) return 0x7fffffffu;
  return (detail::bit_cast<uint32_t>(x) + 0x1000u) & 0xffffe000u;
}

// ---- tensor cores ----

struct MmaRecord {
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
  float d[4];
};

struct HalfPair {
  static constexpr int kDepth = 16, kPerRegister = 2;
  static float element(uint32_t bits, int i) { return load(Half{uint16_t(bits >> 16 * i)}); }
};
struct BFloat16Pair {
  static constexpr int kDepth = 16, kPerRegister = 2;
  static float element(uint32_t bits, int i) { return load(BFloat16{uint16_t(bits >> 16 * i)}); }
};
struct TensorFloat {
  static constexpr int kDepth = 8, kPerRegister = 1;
  static float element(uint32_t bits, int) { return detail::bit_cast<float>(bits & 0xffffe000u); }
};

// Products are exact and summed in double: the hardware's own order and rounding are not
// documented.
template <class Element>
const char* combine_mma(void* const* records, unsigned mask) {
  if (mask != ~0u) return "must name all lanes";
  constexpr int kDepth = Element::kDepth, kPer = Element::kPerRegister, kHalf = kDepth / 2;
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& record = *static_cast<const MmaRecord*>(records[lane]);
    const int group = lane / 4, place = lane % 4 * kPer;
    for (int i = 0; i < kPer; ++i) {
      for (int r = 0; r < 4; ++r) {
        a[group + r % 2 * 8][place + r / 2 * kHalf + i] = Element::element(record.a[r], i);
      }
      for (int r = 0; r < 2; ++r) {
        b[place + r * kHalf + i][group] = Element::element(record.b[r], i);
      }
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto& record = *static_cast<MmaRecord*>(records[lane]);
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      double sum = record.c[r];
      for (int k = 0; k < kDepth; ++k) sum += double(a[row][k]) * double(b[k][column]);
      record.d[r] = float(sum);
    }
  }
  return nullptr;
}

template <class Element>
void mma(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const float (&c)[4], Site site) {
  MmaRecord record{a, b, c, {}};
  warp_collective(name, ~0u, &record, combine_mma<Element>, site);
  std::memcpy(d, record.d, sizeof d);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4], Site site = here()) {
  mma<HalfPair>("mma.m16n8k16.f16", d, a, b, c, site);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              const float (&c)[4], Site site = here()) {
  mma<BFloat16Pair>("mma.m16n8k16.bf16", d, a, b, c, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4], Site site = here()) {
  mma<TensorFloat>("mma.m16n8k8.tf32", d, a, b, c, site);
}

// ---- matrices between shared memory and fragments ----

// A row of an 8 x 8 matrix, on the boundary that the instruction demands.
struct alignas(16) MatrixRow {
  uint16_t element[8];
};

struct MatrixRecord {
  MatrixRow row;         // that the lane gives the address of
  uint32_t fragment[4];  // that the lane holds
};

// Where element i of lane's register for a matrix lies in it.
template <bool kTransposed>
uint16_t& matrix_element(void* const* records, int matrix, int lane, int i) {
  const int major = lane / 4, minor = lane % 4 * 2 + i;
  const int row = kTransposed ? minor : major, column = kTransposed ? major : minor;
  return static_cast<MatrixRecord*>(records[matrix * 8 + row])->row.element[column];
}

template <bool kTransposed>
const char* combine_ldmatrix(void* const* records, unsigned) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      static_cast<MatrixRecord*>(records[lane])->fragment[matrix] =
          matrix_element<kTransposed>(records, matrix, lane, 0) |
          uint32_t(matrix_element<kTransposed>(records, matrix, lane, 1)) << 16;
    }
  }
  return nullptr;
}

template <bool kTransposed>
const char* combine_stmatrix(void* const* records, unsigned) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint32_t bits = static_cast<MatrixRecord*>(records[lane])->fragment[matrix];
      matrix_element<kTransposed>(records, matrix, lane, 0) = uint16_t(bits);
      matrix_element<kTransposed>(records, matrix, lane, 1) = uint16_t(bits >> 16);
    }
  }
  return nullptr;
}

inline void require_shared(const char* name, const void* pointer, Site site) {
  const auto offset = static_cast<const unsigned char*>(pointer) - current_block->shared;
  if (offset < 0 || size_t(offset) + 16 > current_block->shared_bytes) {
    fail("%s at %s:%d: must be in shared memory, got byte %td of it", name, site.file, site.line,
         offset);
  }
}

// Each lane reads, or writes, the row that it gives the address of, so that the race detector knows
// who did.
template <bool kTransposed>
void ldmatrix(uint32_t (&fragment)[4], const void* row, Site site = here()) {
  require_shared("ldmatrix", row, site);
  MatrixRecord record{*static_cast<const MatrixRow*>(row), {}};
  warp_collective("ldmatrix", ~0u, &record, combine_ldmatrix<kTransposed>, site);
  std::memcpy(fragment, record.fragment, sizeof fragment);
}

template <bool kTransposed>
void stmatrix(void* row, const uint32_t (&fragment)[4], Site site = here()) {
  require_shared("stmatrix", row, site);
  MatrixRecord record;
  std::memcpy(record.fragment, fragment, sizeof fragment);
  warp_collective("stmatrix", ~0u, &record, combine_stmatrix<kTransposed>, site);
  *static_cast<MatrixRow*>(row) = record.row;
}

// ---- asynchronous copies ----

// The destination is NaN from the start of the copy until the thread waits for it, and the source
// is read at that moment: both are the worst that a GPU may do.
struct alignas(16) CopiedBytes {
  unsigned char bytes[16];
};

inline void cp_async_16(void* shared, const void* global, int source_bytes = 16,
                        Site site = here()) {
  require_shared("cp.async", shared, site);
  if (source_bytes < 0 || source_bytes > 16) {
    fail("cp.async at %s:%d: source_bytes must be 0 to 16, got %d", site.file, site.line,
         source_bytes);
  }
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("cp.async at %s:%d: misaligned source %p", site.file, site.line, global);
  }
  std::memset(static_cast<CopiedBytes*>(shared)->bytes, 0xff, 16);
  begin_copy({shared, global, source_bytes});
}

inline void cp_async_commit() { end_copy_group(); }

template <int kPending>
void cp_async_wait() {
  for (AsyncCopy copy; take_due_copy(kPending, &copy);) {
    CopiedBytes landed = {};
    std::memcpy(landed.bytes, copy.source, size_t(copy.source_bytes));
    *static_cast<CopiedBytes*>(copy.destination) = landed;
  }
}

// ---- named barriers ----

inline void barrier_sync(int id, int num_threads, Site site = here()) {
  named_barrier(id, num_threads, true, site);
}
inline void barrier_arrive(int id, int num_threads, Site site = here()) {
  named_barrier(id, num_threads, false, site);
}

}  // namespace fused::emulator
