// The element types that kernels load and store, the same for nvcc and g++.
//
// Kernels compute in Accumulator<T>: float for the 16-bit types and float, double for double.
// Half and BFloat16 are storage only; arithmetic on them goes through load() and store<T>().
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FUSED_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fused {

enum class DType : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct alignas(2) Half {
  uint16_t bits;
};

struct alignas(2) BFloat16 {
  uint16_t bits;
};

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

namespace detail {

template <typename To, typename From>
FUSED_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Branch-free, so that loops over it vectorise. Exponents are moved by a multiplication, which also
// brings out subnormals exactly; infinities and NaN take the float's largest exponent.
FUSED_HOST_DEVICE float half_bits_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);  // 2^112
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t value = magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(sign | value);
}

// Round to nearest, ties to even; overflow gives infinity, NaN stays NaN.
FUSED_HOST_DEVICE uint16_t float_to_half_bits(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: add half of the last kept place (less one where that place is even), shift.
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  const uint32_t normal = (rounded - 0x38000000u) >> 13;
  // Subnormal results: adding 0.5 lets the float unit round at 2^-24.
  const float shifted = bit_cast<float>(magnitude) + 0.5f;
  const uint32_t subnormal = bit_cast<uint32_t>(shifted) - 0x3f000000u;
  uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
  value = rounded >= 0x47800000u ? 0x7c00u : value;
  value = magnitude > 0x7f800000u ? 0x7e00u : value;
  return static_cast<uint16_t>(sign | value);
}

FUSED_HOST_DEVICE uint16_t float_to_bfloat16_bits(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded >> 16);
}

}  // namespace detail

FUSED_HOST_DEVICE float load(float x) { return x; }
FUSED_HOST_DEVICE double load(double x) { return x; }
FUSED_HOST_DEVICE float load(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  return detail::half_bits_to_float(x.bits);
#endif
}
FUSED_HOST_DEVICE float load(BFloat16 x) {
  return detail::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

template <typename T>
FUSED_HOST_DEVICE T store(Accumulator<T> x);
template <>
FUSED_HOST_DEVICE float store<float>(float x) {
  return x;
}
template <>
FUSED_HOST_DEVICE double store<double>(double x) {
  return x;
}
template <>
FUSED_HOST_DEVICE Half store<Half>(float x) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(x))};
#else
  return Half{detail::float_to_half_bits(x)};
#endif
}
template <>
FUSED_HOST_DEVICE BFloat16 store<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  return BFloat16{detail::float_to_bfloat16_bits(x)};
#endif
}

// Two neighbours of 16 bits in one register, the first in its low half, as matrix fragments hold
// them. On a GPU one instruction.
template <typename T>
FUSED_HOST_DEVICE uint32_t store_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, Half>) {
    return detail::bit_cast<uint32_t>(__floats2half2_rn(first, second));
  } else {
    return detail::bit_cast<uint32_t>(__floats2bfloat162_rn(first, second));
  }
#else
  return store<T>(first).bits | static_cast<uint32_t>(store<T>(second).bits) << 16;
#endif
}

// Calls `visitor(Type{})` with the storage type of `dtype`, returning what it returns. DType is
// checked where tensors enter, so that every value has its case here.
template <typename Visitor>
auto visit_dtype(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::kFloat64:
      return visitor(double{});
    case DType::kFloat16:
      return visitor(Half{});
    case DType::kBFloat16:
      return visitor(BFloat16{});
    case DType::kFloat32:
      break;
  }
  return visitor(float{});
}

}  // namespace fused
