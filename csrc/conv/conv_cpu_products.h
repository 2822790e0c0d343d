// The matrix products that a unit of the dense CPU engines comes to: how its piece of the source is
// read, which pixels meet which taps, and in which order the sums go. Plain C++, decided from the
// shape alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "conv/conv_cpu_plan.h"

namespace fused {

// In which order a sum over (channel, tap) goes: as the weight lies in memory, so that packing and
// unpacking it moves whole runs.
struct StepOrder {
  bool tap_major;
  int64_t channels, taps[3];

  static StepOrder by_channel(int64_t channels, const int32_t* taps) {
    return StepOrder(channels, taps, 2, 1);
  }
  StepOrder(int64_t channels, const int32_t* taps, int64_t channel_stride, int64_t tap_stride)
      : tap_major(channel_stride <= tap_stride || int64_t{taps[0]} * taps[1] * taps[2] == 1),
        channels(channels),
        taps{taps[0], taps[1], taps[2]} {}
  int64_t num_taps() const { return taps[0] * taps[1] * taps[2]; }
  int64_t size() const { return channels * num_taps(); }
  int64_t at(int64_t channel, int64_t tap) const {
    return tap_major ? tap * channels + channel : channel * num_taps() + tap;
  }
};

// Where a unit's piece of the source lies: position s along an axis of space at
// (s - origin) * stride.
struct SourceView {
  ConvStrides stride;
  int64_t origin[3];
};

// An axis that several tensors share, each with its own stride.
template <int kTensors>
struct BoxAxis {
  int64_t count, stride[kTensors];
};
template <int kTensors>
using Box = std::array<BoxAxis<kTensors>, 5>;  // slow to fast

// The same elements in as few axes as it takes, the fastest last: neighbours that are dense in all
// tensors are one.
template <int kTensors>
inline Box<kTensors> collapse(const Box<kTensors>& axes) {
  Box<kTensors> box;
  box.fill({1, {}});
  size_t fastest = box.size();
  for (size_t i = axes.size(); i-- > 0;) {
    if (axes[i].count == 1) continue;
    bool dense = fastest < box.size();
    for (int t = 0; dense && t < kTensors; ++t) {
      dense = axes[i].stride[t] == box[fastest].count * box[fastest].stride[t];
    }
    if (dense) {
      box[fastest].count *= axes[i].count;
    } else {
      box[--fastest] = axes[i];
    }
  }
  return box;
}

// How the pieces of a correlation's source are read: where they are, or from a copy in
// accumulators, a tile. It holds what lies inside of the source, no zeros around it.
struct SourcePlan {
  bool direct, by_channel;  // by_channel: the tile's fastest axis is the channel, as in the source
  int64_t channels, extent[3], tile_size;
  ConvStrides stride;  // of the tile, or of the source

  SourcePlan(const Correlation& c, const UnitShape& unit, int64_t channels, bool direct)
      : direct(direct), by_channel(c.source_stride.channel == 1), channels(channels), tile_size(1) {
    stride = c.source_stride;
    if (direct) return;
    const int64_t positions[3] = {1, unit.rows, unit.columns};
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t reach = (positions[axis] - 1) * c.step[axis] +
                            std::abs(int64_t{c.tap_step[axis]}) * (c.taps[axis] - 1) + 1;
      extent[axis] = std::min<int64_t>(reach, c.source_size[axis]);
    }
    const int64_t pixels = extent[0] * extent[1] * extent[2];
    // Planes a power of two apart would meet in a few sets of the cache.
    const int64_t plane = pixels % 128 == 0 ? pixels + 16 : pixels;
    stride.channel = by_channel ? 1 : plane;
    // Nor pixels: a product reads one channel of eight of them at a time.
    stride.space[2] = !by_channel ? 1 : channels % 8 == 0 ? channels + 4 : channels;
    stride.space[1] = stride.space[2] * extent[2];
    stride.space[0] = stride.space[1] * extent[1];
    stride.outer = by_channel ? stride.space[0] * extent[0] : plane * channels;
    tile_size = stride.outer * unit.images;
  }

  SourceView view(const Correlation& c, const Unit& unit) const {
    SourceView v{stride, {0, 0, 0}};
    const int64_t first[3] = {unit.z, unit.y, unit.x};
    for (int axis = 0; axis < 3 && !direct; ++axis) {
      const int64_t reach = int64_t{c.tap_step[axis]} * (c.taps[axis] - 1);
      v.origin[axis] = std::max<int64_t>(
          0, c.start[axis] + c.step[axis] * first[axis] + std::min<int64_t>(0, reach));
    }
    return v;
  }
};

// The matrix products that make up a unit. Their left side is the source, in which an element is
// found by the sum of two offsets: where a pixel begins and where a (channel, tap) lies from there.
// What lies outside of the source is in no product: no zeros are packed, none are multiplied.
struct Products {
  struct Product {
    int64_t pixel, num_pixels, step, num_steps;  // where its part of the lists begins, its length
  };
  std::vector<Product> list;
  std::vector<int64_t> pixel_source, pixel_row;  // row: of the unit's pixels, times `width`
  std::vector<int64_t> step_source, step_row;    // row: by the StepOrder, times `width`
  Unit made_for{};                               // and the number of channels
  int64_t made_channels = 0;

  // Pixels for which the same taps are inside (corners, edges, the interior) by all their steps:
  // long sums, for the forward pass.
  void by_class(const Correlation& c, const std::vector<AxisRun> (&runs)[3], const Unit& unit,
                const SourceView& view, const StepOrder& order, int64_t width) {
    if (serve(unit, order)) return;
    for (const AxisRun& z : runs[0]) {
      if (unit.z < z.positions.begin || unit.z >= z.positions.end) continue;
      for (const AxisRun& y : runs[1]) {
        for (const AxisRun& x : runs[2]) {
          begin_product();
          list_pixels(c, unit, view, y.positions, x.positions, width);
          if (list.back().pixel == size(pixel_source)) {
            list.pop_back();
            continue;
          }
          list_steps(c, view, order, z.taps, y.taps, x.taps, width);
          end_product();
        }
      }
    }
  }

  // Taps, each by the channels and all pixels for which it is inside: the weight's gradient, whose
  // sums run over pixels.
  void by_tap(const Correlation& c, const Unit& unit, const SourceView& view,
              const StepOrder& order, int64_t width) {
    if (serve(unit, order)) return;
    for (int64_t w = 0; w < order.taps[0]; ++w) {
      const Span z = inside_span(c, 0, w);
      if (unit.z < z.begin || unit.z >= z.end) continue;
      for (int64_t v = 0; v < order.taps[1]; ++v) {
        for (int64_t u = 0; u < order.taps[2]; ++u) {
          begin_product();
          list_pixels(c, unit, view, inside_span(c, 1, v), inside_span(c, 2, u), width);
          list_steps(c, view, order, {w, w + 1}, {v, v + 1}, {u, u + 1}, width);
          end_product();
        }
      }
    }
  }

 private:
  static int64_t size(const std::vector<int64_t>& v) { return static_cast<int64_t>(v.size()); }
  // Whether the products at hand are this unit's too, for offsets are from its first image and
  // first channel; else there are none any more.
  bool serve(const Unit& unit, const StepOrder& order) {
    const Unit& m = made_for;
    if (made_channels == order.channels && m.z == unit.z && m.y == unit.y && m.x == unit.x &&
        m.images == unit.images && m.rows == unit.rows && m.columns == unit.columns) {
      return true;
    }
    made_for = unit;
    made_channels = order.channels;
    list.clear();
    for (auto* offsets : {&pixel_source, &pixel_row, &step_source, &step_row}) offsets->clear();
    return false;
  }
  void begin_product() { list.push_back({size(pixel_source), 0, size(step_source), 0}); }
  void end_product() {
    list.back().num_pixels = size(pixel_source) - list.back().pixel;
    list.back().num_steps = size(step_source) - list.back().step;
  }

  // The pixels of the unit whose y and x lie in the spans.
  void list_pixels(const Correlation& c, const Unit& unit, const SourceView& view, Span y, Span x,
                   int64_t width) {
    y = {std::max(y.begin, unit.y), std::min(y.end, unit.y + unit.rows)};
    x = {std::max(x.begin, unit.x), std::min(x.end, unit.x + unit.columns)};
    const auto source = [&](int axis, int64_t j) {
      return (c.start[axis] + c.step[axis] * j - view.origin[axis]) * view.stride.space[axis];
    };
    for (int64_t i = 0; i < unit.images; ++i) {
      for (int64_t v = y.begin; v < y.end; ++v) {
        const int64_t line = i * view.stride.outer + source(0, unit.z) + source(1, v);
        const int64_t row = (i * unit.rows + v - unit.y) * unit.columns - unit.x;
        const int64_t count = std::max<int64_t>(0, x.end - x.begin), end = size(pixel_row);
        pixel_source.resize(end + count);
        pixel_row.resize(end + count);
        for (int64_t u = 0; u < count; ++u) {
          pixel_source[end + u] = line + source(2, x.begin + u);
          pixel_row[end + u] = (row + x.begin + u) * width;
        }
      }
    }
  }

  void list_steps(const Correlation& c, const SourceView& view, const StepOrder& order, Span z,
                  Span y, Span x, int64_t width) {
    const auto for_each_tap = [&](const auto& visit) {
      for (int64_t w = z.begin; w < z.end; ++w) {
        for (int64_t v = y.begin; v < y.end; ++v) {
          for (int64_t u = x.begin; u < x.end; ++u) {
            visit(c.tap_step[0] * w * view.stride.space[0] +
                      c.tap_step[1] * v * view.stride.space[1] +
                      c.tap_step[2] * u * view.stride.space[2],
                  (w * order.taps[1] + v) * order.taps[2] + u);
          }
        }
      }
    };
    const auto push = [&](int64_t source, int64_t channel, int64_t tap) {
      step_source.push_back(source + channel * view.stride.channel);
      step_row.push_back(order.at(channel, tap) * width);
    };
    if (order.tap_major) {
      for_each_tap([&](int64_t source, int64_t tap) {
        for (int64_t d = 0; d < order.channels; ++d) push(source, d, tap);
      });
      return;
    }
    for (int64_t d = 0; d < order.channels; ++d) {
      for_each_tap([&](int64_t source, int64_t tap) { push(source, d, tap); });
    }
  }
};

// Columns of a weight's panel: whole vectors of output channels, at most four or three at a time
// (`most`), one fewer where that leaves no single one over.
inline int64_t panel_width(int64_t channels, int64_t lanes, int64_t most) {
  const int64_t vectors = std::max<int64_t>(1, ceil_div(channels, lanes));
  const bool fewer = vectors % most == 1 || (most == 4 && vectors % 3 == 0);
  return lanes * std::min(vectors, fewer ? most - 1 : most);
}

}  // namespace fused
