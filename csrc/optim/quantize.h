// States of one byte: block-wise dynamic quantisation (Dettmers et al., arXiv:2110.02861).
//
// 256 elements share a float, their largest magnitude; an element is a level times that float. The
// levels are dense near 1 and reach down seven decades: level m, 1 <= m <= 255, lies in the decade
// that ends at 10^-d, where n = 128 >> d is the highest bit of m, and the n levels of a decade are
// evenly spaced up to and including its end. So level 255 is 1, and the map from m to level is
// linear in each decade and continuous, which makes rounding a subtraction and a product.
//
// Signed states (moments, momentum) hold -127 ... 127: the lower half of the levels, times ten.
// Unsigned ones (second moments) hold 0 and levels 2 ... 255; what is not zero is never rounded to
// zero, because a step divides by its root. A block with a NaN or an infinity becomes NaN.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace fused {

constexpr int kQuantBlock = 256;

inline int64_t num_quant_blocks(int64_t numel) { return (numel + kQuantBlock - 1) / kQuantBlock; }

namespace detail {

constexpr double decade_end(int d) { return d == 0 ? 1.0 : decade_end(d - 1) / 10; }

// Values begin < x <= end of a decade are levels: x = base + slope * level. Members, for device
// code may not call a host function even to initialise a constant.
template <int d>
struct Decade {
  static constexpr double kLevels = 128 >> d;
  static constexpr float kBegin = static_cast<float>(decade_end(d + 1));
  static constexpr float kBase = static_cast<float>(decade_end(d) * (0.9 / kLevels - 0.8));
  static constexpr float kSlope = static_cast<float>(decade_end(d) * 0.9 / kLevels);
  static constexpr float kInverseSlope = static_cast<float>(kLevels / (0.9 * decade_end(d)));
};
constexpr int kLastDecade = 7;

// Selects, not branches: they vectorise.
template <int d>
FUSED_HOST_DEVICE void decade_of_level(int level, float& base, float& slope) {
  if constexpr (d >= 0) {
    base = level >= (128 >> d) ? Decade<d>::kBase : base;
    slope = level >= (128 >> d) ? Decade<d>::kSlope : slope;
    decade_of_level<d - 1>(level, base, slope);
  }
}

template <int d>
FUSED_HOST_DEVICE void decade_of_value(float value, float& base, float& inverse_slope) {
  if constexpr (d >= 0) {
    base = value > Decade<d>::kBegin ? Decade<d>::kBase : base;
    inverse_slope = value > Decade<d>::kBegin ? Decade<d>::kInverseSlope : inverse_slope;
    decade_of_value<d - 1>(value, base, inverse_slope);
  }
}

// The value of level 0 ... 255.
FUSED_HOST_DEVICE float value_of_level(int level) {
  float base = Decade<kLastDecade>::kBase, slope = Decade<kLastDecade>::kSlope;
  decade_of_level<kLastDecade - 1>(level, base, slope);
  return level > 0 ? base + slope * static_cast<float>(level) : 0.0f;
}

// The level nearest to a value in [0, 1].
FUSED_HOST_DEVICE int level_of_value(float value) {
  float base = Decade<kLastDecade>::kBase, inverse_slope = Decade<kLastDecade>::kInverseSlope;
  decade_of_value<kLastDecade - 1>(value, base, inverse_slope);
  const float level = (value - base) * inverse_slope + 0.5f;
  return level > 0 ? static_cast<int>(level) : 0;
}

}  // namespace detail

// `scale` is the largest magnitude of the block.
template <bool kUnsigned>
FUSED_HOST_DEVICE float dequantize(uint8_t code, float scale) {
  if (kUnsigned) return scale * (code > 0 ? detail::value_of_level(code + 1) : 0.0f);
  const int number = static_cast<int8_t>(code);
  const float magnitude = 10.0f * detail::value_of_level(number < 0 ? -number : number);
  return scale * (number < 0 ? -magnitude : magnitude);
}

template <bool kUnsigned>
FUSED_HOST_DEVICE uint8_t quantize(float value, float scale) {
  const float ratio = value / scale;
  const float magnitude = ratio < 0 ? -ratio : ratio;
  const float known = magnitude <= 2.0f ? magnitude : 0.0f;  // not NaN, of 0 / 0 and inf / inf
  if (kUnsigned) {
    const int level = detail::level_of_value(known);
    const int least = known > 0 ? 2 : 1;
    return static_cast<uint8_t>((level > least ? level : least) - 1);
  }
  const int level = detail::level_of_value(0.1f * known);
  return static_cast<uint8_t>(ratio < 0 ? -level : level);
}

}  // namespace fused
