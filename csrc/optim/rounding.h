// How a 16-bit parameter takes a float32 result: with the rest kept beside it, or by chance.
#pragma once

#include "common/dtype.h"
#include "common/philox.h"

namespace fused {

// A bfloat16 parameter and 16 bits that together are one float32, exactly. The parameter is the
// float32 rounded to nearest, ties away from zero (with ties to even the sign of a tie's rest would
// be lost); the remainder is what has to be added to its bits. NaN is one NaN.
//
// A parameter that someone else has set meets the remainder of what it was: half a step off at
// most, but for a remainder below zero or above infinity, which would make NaN. It counts as none.
FUSED_HOST_DEVICE float join_remainder(BFloat16 param, int16_t remainder) {
  const uint32_t bits = static_cast<uint32_t>(param.bits) << 16, magnitude = bits << 1;
  const int32_t lowest = magnitude == 0 ? 0 : -32768,
                highest = magnitude == 0xff000000u ? 0 : 32767;
  if (remainder < lowest || remainder > highest) remainder = 0;
  return detail::bit_cast<float>(bits + static_cast<uint32_t>(static_cast<int32_t>(remainder)));
}

FUSED_HOST_DEVICE BFloat16 split_remainder(float master, int16_t& remainder) {
  const uint32_t given = detail::bit_cast<uint32_t>(master);
  const uint32_t bits = (given & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : given;
  const uint32_t high = (bits + 0x8000u) >> 16;
  remainder = static_cast<int16_t>(static_cast<uint16_t>(bits));
  return BFloat16{static_cast<uint16_t>(high)};
}

// Eight elements share the 128 bits of one counter: 16 for each.
constexpr int kRandomGroup = 8;

// The random bits of elements 8 * group ... 8 * group + 7 of a step's tensor `index`.
FUSED_HOST_DEVICE Philox4 random_bits(const int64_t* rng, int64_t index, int64_t group) {
  return philox4x32_10(static_cast<uint64_t>(rng[0]),
                       {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32),
                        static_cast<uint32_t>(index), static_cast<uint32_t>(rng[1])});
}

FUSED_HOST_DEVICE uint32_t random_of_element(const Philox4& bits, int element) {
  const uint32_t low = element / 2 % 2 == 0 ? bits.x : bits.y;
  const uint32_t high = element / 2 % 2 == 0 ? bits.z : bits.w;
  const uint32_t word = element < 4 ? low : high;
  return element % 2 == 0 ? word & 0xffffu : word >> 16;
}

// One of the two neighbours of x, each as likely as x is near to it. `random` is 16 bits.
template <typename T>
FUSED_HOST_DEVICE T round_stochastically(float x, uint32_t random);

template <>
FUSED_HOST_DEVICE BFloat16 round_stochastically<BFloat16>(float x, uint32_t random) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint16_t rounded = static_cast<uint16_t>((bits + random) >> 16);
  return BFloat16{finite ? rounded : store<BFloat16>(x).bits};
}

template <>
FUSED_HOST_DEVICE Half round_stochastically<Half>(float x, uint32_t random) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal results lose 13 bits of the mantissa; subnormal ones are multiples of 2^-24.
  const uint32_t normal = (magnitude + (random >> 3) - 0x38000000u) >> 13;
  const float steps = detail::bit_cast<float>(magnitude) * 16777216.0f;
  const float limited = steps < 1024.0f ? steps : 0.0f;
  const uint32_t subnormal =
      static_cast<uint32_t>(limited + static_cast<float>(random) * (1.0f / 65536.0f));
  uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
  value = value > 0x7c00u ? 0x7c00u : value;
  const bool finite = magnitude < 0x7f800000u;
  return Half{finite ? static_cast<uint16_t>(sign | value) : store<Half>(x).bits};
}

}  // namespace fused
