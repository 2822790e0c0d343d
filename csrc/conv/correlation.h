// The forward pass and the gradient of the input as one operation, so that each backend has one
// engine for both.
//
//   dest[n, g, m, j] = act(bias[g, m] + sum over r, u of weight[g, m, r, u]
//                                       source[n, g, r, start + step j + tap_step u])
//
// Forward: dest = output, j = o, u = t, start = -p, step = s, tap_step = d.
//
// Gradient of the input: dest = grad_input, source = grad_output, and i = o s - p + t d. Input
// positions with i + p = s q + e are one correlation for each residue e = 0 .. s - 1: there t d has
// to leave the residue e too, t d = s v + e, and then o = q - v. The taps that do are evenly spaced
// (t = t0 + u s / gcd(s, d)), and so are the positions, so that start, step and tap_step are again
// all it takes, with step = 1, and no tap is visited in vain. Along each axis of space alike.
#pragma once

#include <cstdint>
#include <type_traits>

#include "conv/conv.h"

namespace fused {

struct Correlation {
  const void* source;
  const void* weight;
  const void* maybe_bias;
  void* dest;
  void* maybe_pre;
  ConvStrides source_stride, dest_stride;  // dest_stride between positions of this lattice
  struct {
    int64_t group, row, depth, tap[3];
  } weight_stride;
  int32_t batch, groups;
  int32_t rows;            // destination channels in a group (index m)
  int32_t depth;           // source channels in a group (index r)
  int32_t source_size[3];  // valid source positions are 0 .. source_size - 1
  int32_t count[3];        // destination positions (index j)
  int32_t taps[3];         // (index u)
  int32_t start[3], step[3], tap_step[3];
  DType dtype;
  bool allow_tf32;
  Activation activation;
};
static_assert(std::is_trivially_copyable_v<Correlation>);
static_assert(sizeof(Correlation) <= 4096, "every architecture's argument space");

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline Correlation forward_correlation(const ConvForwardParams& p) {
  const ConvGeometry& g = p.geometry;
  Correlation c{};
  c.source = p.input;
  c.weight = p.weight;
  c.maybe_bias = p.maybe_bias;
  c.dest = p.output;
  c.maybe_pre = p.maybe_pre;
  c.source_stride = p.input_stride;
  c.dest_stride = p.output_stride;
  c.batch = g.batch;
  c.groups = g.groups;
  c.rows = g.out_channels / g.groups;
  c.depth = g.in_channels / g.groups;
  c.weight_stride.group = c.rows * p.weight_stride.outer;
  c.weight_stride.row = p.weight_stride.outer;
  c.weight_stride.depth = p.weight_stride.channel;
  for (int axis = 0; axis < 3; ++axis) {
    c.weight_stride.tap[axis] = p.weight_stride.space[axis];
    c.source_size[axis] = g.in_size[axis];
    c.count[axis] = g.out_size[axis];
    c.taps[axis] = g.kernel[axis];
    c.start[axis] = -g.padding[axis];
    c.step[axis] = g.stride[axis];
    c.tap_step[axis] = g.dilation[axis];
  }
  c.dtype = p.dtype;
  c.allow_tf32 = p.allow_tf32;
  c.activation = p.activation;
  return c;
}

// One residue of the stride along one axis: the positions i0 + s j and the taps t0 + u tap_spacing.
struct ResidueAxis {
  int32_t first_position, num_positions;
  int32_t first_tap, tap_spacing, num_taps;
  int32_t start, tap_step;
};

inline ResidueAxis residue_axis(const ConvGeometry& g, int axis, int32_t residue) {
  const int32_t s = g.stride[axis], d = g.dilation[axis], p = g.padding[axis];
  ResidueAxis r{};
  r.first_position = static_cast<int32_t>(((int64_t{residue} - p) % s + s) % s);
  if (r.first_position < g.in_size[axis]) {
    r.num_positions = (g.in_size[axis] - 1 - r.first_position) / s + 1;
  }
  // The taps of this residue repeat with s / gcd(s, d); the first comes before that.
  int32_t common = s, rest = d;
  while (rest != 0) {
    const int32_t next = common % rest;
    common = rest;
    rest = next;
  }
  r.tap_spacing = s / common;
  int32_t t = 0;
  while (t < r.tap_spacing && t < g.kernel[axis] && int64_t{t} * d % s != residue) ++t;
  if (t == r.tap_spacing || t >= g.kernel[axis]) return r;  // num_taps = 0
  r.first_tap = t;
  r.num_taps = (g.kernel[axis] - 1 - t) / r.tap_spacing + 1;
  r.tap_step = -(d / common);
  // q of the first position, less v of the first tap.
  const int64_t q = (int64_t{r.first_position} + p - residue) / s;
  const int64_t v = (int64_t{t} * d - residue) / s;
  r.start = static_cast<int32_t>(q - v);
  return r;
}

// Calls visit(Correlation) for every residue that has positions and taps; returns the first status
// that is not a success. Residues are found from the taps, so that a huge stride costs nothing.
template <typename Visit>
Status for_each_backward_input_correlation(const ConvBackwardInputParams& p, const Visit& visit) {
  const ConvGeometry& g = p.geometry;
  Correlation c{};
  c.source = p.grad_output;
  c.source_stride = p.grad_output_stride;
  c.batch = g.batch;
  c.groups = g.groups;
  c.rows = g.in_channels / g.groups;
  c.depth = g.out_channels / g.groups;
  c.weight_stride.group = c.depth * p.weight_stride.outer;
  c.weight_stride.row = p.weight_stride.channel;
  c.weight_stride.depth = p.weight_stride.outer;
  c.dtype = p.dtype;
  c.allow_tf32 = p.allow_tf32;
  c.activation = Activation::kNone;
  c.dest_stride = p.grad_input_stride;
  for (int axis = 0; axis < 3; ++axis) {
    c.source_size[axis] = g.out_size[axis];
    c.step[axis] = 1;
    c.dest_stride.space[axis] = p.grad_input_stride.space[axis] * g.stride[axis];
  }
  // Tap t is the first of its residue if t < tap_spacing: these taps number the residues.
  int32_t first[3] = {0, 0, 0};
  const auto residue = [&](int axis) {
    return residue_axis(
        g, axis, static_cast<int32_t>(int64_t{first[axis]} * g.dilation[axis] % g.stride[axis]));
  };
  const auto last = [&](int axis) {
    first[axis] = 0;
    const int32_t spacing = residue(axis).tap_spacing;
    return spacing < g.kernel[axis] ? spacing : g.kernel[axis];
  };
  const int32_t ends[3] = {last(0), last(1), last(2)};
  for (first[0] = 0; first[0] < ends[0]; ++first[0]) {
    for (first[1] = 0; first[1] < ends[1]; ++first[1]) {
      for (first[2] = 0; first[2] < ends[2]; ++first[2]) {
        int64_t dest_offset = 0, weight_offset = 0, positions = 1;
        for (int axis = 0; axis < 3; ++axis) {
          const ResidueAxis r = residue(axis);
          c.count[axis] = r.num_positions;
          c.taps[axis] = r.num_taps;
          c.start[axis] = r.start;
          c.tap_step[axis] = r.tap_step;
          c.weight_stride.tap[axis] = p.weight_stride.space[axis] * r.tap_spacing;
          dest_offset += p.grad_input_stride.space[axis] * r.first_position;
          weight_offset += p.weight_stride.space[axis] * r.first_tap;
          positions *= r.num_positions;
        }
        if (positions == 0) continue;
        const int64_t bytes = size_of(p.dtype);
        c.dest = static_cast<char*>(p.grad_input) + dest_offset * bytes;
        c.weight = static_cast<const char*>(p.weight) + weight_offset * bytes;
        if (Status status = visit(c)) return status;
      }
    }
  }
  return nullptr;
}

}  // namespace fused
