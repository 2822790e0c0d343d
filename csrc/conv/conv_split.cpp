// Decisions that follow from the shape alone, shared by the glue and the launchers.
#include <algorithm>
#include <numeric>

#include "conv/conv.h"

namespace fused {

bool conv_backward_input_sparse(const ConvGeometry& g) {
  for (int axis = 0; axis < 3; ++axis) {
    const int32_t residues = g.stride[axis] / std::gcd(g.stride[axis], g.dilation[axis]);
    if (std::min(residues, g.kernel[axis]) < g.stride[axis]) return true;
  }
  return false;
}

int64_t conv_packed_elements(const ConvGeometry& g, bool backward_input) {
  const int32_t rows = (backward_input ? g.in_channels : g.out_channels) / g.groups;
  const int32_t depth = (backward_input ? g.out_channels : g.in_channels) / g.groups;
  if (takes_depthwise_kernel(g.groups, rows, depth)) return 0;
  const int64_t products = int64_t{depth} * g.kernel[0] * g.kernel[1] * g.kernel[2];
  return int64_t{g.groups} * rows * ((products + kMmaDepth - 1) / kMmaDepth * kMmaDepth);
}

ConvWeightSplits conv_weight_splits(const ConvGeometry& g) {
  constexpr int64_t kBlocksWanted = 512;  // a few for each multiprocessor of a large GPU
  constexpr int64_t kTile = 64;
  const int64_t taps = int64_t{g.kernel[0]} * g.kernel[1] * g.kernel[2];
  const int64_t pixels = int64_t{g.batch} * g.out_size[0] * g.out_size[1] * g.out_size[2];
  const auto tiles = [](int64_t n) { return (n + kTile - 1) / kTile; };
  const int64_t blocks = is_depthwise(g) ? g.out_channels
                                         : g.groups * tiles(g.out_channels / g.groups) *
                                               tiles(g.in_channels / g.groups * taps);
  const auto splits = [&](int64_t blocks, int64_t pixels_each) {
    const int64_t wanted = kBlocksWanted / std::max<int64_t>(1, blocks);
    return static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, pixels / pixels_each + 1));
  };
  return {splits(blocks, 512), splits(g.out_channels, 4096)};
}

}  // namespace fused
