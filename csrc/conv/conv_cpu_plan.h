// How the CPU engines cut a correlation into units of work: what a unit covers, and where in its
// tile each tap reads. Plain C++, decided once per call from the shape alone, so that a result does
// not depend on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "conv/correlation.h"

namespace fused {

// Destination positions of a unit: `images` images, one depth, `rows` rows, `columns` columns.
struct UnitShape {
  int64_t images, rows, columns;
};

// One unit: its first position and how much of the unit's shape lies inside.
struct Unit {
  int64_t image, z, y, x;
  int64_t images, rows, columns;
};

// Numbers the units of a correlation, images fastest: neighbours differ in where they lie only.
struct UnitGrid {
  UnitShape shape;
  int64_t batch, count[3];
  int64_t blocks_y, blocks_x, blocks_images;

  UnitGrid(const UnitShape& shape, int64_t batch, const int32_t* counts)
      : shape(shape), batch(batch), count{counts[0], counts[1], counts[2]} {
    blocks_images = ceil_div(batch, shape.images);
    blocks_y = ceil_div(count[1], shape.rows);
    blocks_x = ceil_div(count[2], shape.columns);
  }
  int64_t size() const { return blocks_images * count[0] * blocks_y * blocks_x; }
  Unit at(int64_t index) const {
    Unit u;
    u.image = index % blocks_images * shape.images;
    index /= blocks_images;
    u.x = index % blocks_x * shape.columns;
    index /= blocks_x;
    u.y = index % blocks_y * shape.rows;
    u.z = index / blocks_y;
    u.images = std::min(shape.images, batch - u.image);
    u.rows = std::min(shape.rows, count[1] - u.y);
    u.columns = std::min(shape.columns, count[2] - u.x);
    return u;
  }
};

// About `target` positions in whole rows, whole images where they are small; the units of an axis
// about alike.
inline UnitShape unit_shape(const int32_t* count, int64_t batch, int64_t target) {
  const auto share = [](int64_t all, int64_t most) {
    return ceil_div(all, ceil_div(all, std::clamp<int64_t>(most, 1, all)));
  };
  UnitShape unit{1, 1, share(count[2], target)};
  if (unit.columns < count[2]) return unit;
  unit.rows = share(count[1], target / unit.columns);
  if (unit.rows < count[1] || count[0] > 1) return unit;
  unit.images = share(batch, target / (unit.rows * unit.columns));
  return unit;
}

// Source positions along one axis, split by their residue modulo the step ("slots"), so that what
// one tap reads for neighbouring destinations lies side by side whatever the step is.
// Element i of slot s, for a unit that begins at destination j0, is the source position
// first[s] + step * (j0 + i); tap u reads element (j - j0) + shift[u] of slot slot[u].
struct TapAxis {
  int64_t extra = 0;  // elements beyond one per destination
  std::vector<int64_t> first, slot, shift;
};

inline TapAxis tap_axis(const Correlation& c, int axis) {
  TapAxis t;
  const int64_t step = c.step[axis];
  std::vector<int64_t> residues;
  int64_t lowest = 0, highest = 0;
  for (int64_t u = 0; u < c.taps[axis]; ++u) {
    const int64_t position = c.tap_step[axis] * u;
    const int64_t residue = (position % step + step) % step;
    const int64_t shift = (position - residue) / step;
    const auto known = std::find(residues.begin(), residues.end(), residue);
    t.slot.push_back(known - residues.begin());
    if (known == residues.end()) residues.push_back(residue);
    t.shift.push_back(shift);
    lowest = u == 0 ? shift : std::min(lowest, shift);
    highest = u == 0 ? shift : std::max(highest, shift);
  }
  for (int64_t& shift : t.shift) shift -= lowest;
  for (int64_t residue : residues) t.first.push_back(c.start[axis] + step * lowest + residue);
  t.extra = highest - lowest;
  return t;
}

inline int64_t num_taps(const Correlation& c) { return int64_t{c.taps[0]} * c.taps[1] * c.taps[2]; }

// One past the highest element of the source, of the destination.
inline int64_t one_past(const ConvStrides& stride, int64_t batch, int64_t channels,
                        const int32_t* size) {
  int64_t last = (batch - 1) * stride.outer + (channels - 1) * stride.channel;
  for (int axis = 0; axis < 3; ++axis) last += (size[axis] - 1) * stride.space[axis];
  return last + 1;
}
inline int64_t source_end(const Correlation& c) {
  return one_past(c.source_stride, c.batch, int64_t{c.groups} * c.depth, c.source_size);
}
inline int64_t dest_end(const Correlation& c) {
  return one_past(c.dest_stride, c.batch, int64_t{c.groups} * c.rows, c.count);
}

// Whether every tap of every destination reads inside the source.
inline bool reads_inside(const Correlation& c) {
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t reach = int64_t{c.tap_step[axis]} * (c.taps[axis] - 1);
    const int64_t lowest = c.start[axis] + std::min<int64_t>(0, reach);
    const int64_t highest =
        c.start[axis] + std::max<int64_t>(0, reach) + int64_t{c.step[axis]} * (c.count[axis] - 1);
    if (lowest < 0 || highest >= c.source_size[axis]) return false;
  }
  return true;
}

// Tiles stay well inside a second-level cache (elements).
constexpr int64_t kTileElements = 48 * 1024;

// The destination positions whose tap u reads inside the source: begin .. end - 1.
struct Span {
  int64_t begin, end;
};

inline Span inside_span(const Correlation& c, int axis, int64_t u) {
  const int64_t step = c.step[axis], at = c.start[axis] + c.tap_step[axis] * u;
  const int64_t room = c.source_size[axis] - at;
  const int64_t end = room <= 0 ? 0 : std::min<int64_t>(c.count[axis], ceil_div(room, step));
  return {at >= 0 ? 0 : std::min(end, ceil_div(-at, step)), end};
}

// Neighbouring destination positions for which the same taps read inside the source.
struct AxisRun {
  Span positions, taps;
};

inline std::vector<AxisRun> axis_runs(const Correlation& c, int axis) {
  std::vector<Span> inside;
  std::vector<int64_t> cuts{0, c.count[axis]};
  for (int64_t u = 0; u < c.taps[axis]; ++u) {
    inside.push_back(inside_span(c, axis, u));
    cuts.insert(cuts.end(), {inside[u].begin, inside[u].end});
  }
  std::sort(cuts.begin(), cuts.end());
  std::vector<AxisRun> runs;
  for (size_t i = 1; i < cuts.size(); ++i) {
    if (cuts[i - 1] == cuts[i]) continue;
    AxisRun run{{cuts[i - 1], cuts[i]}, {c.taps[axis], 0}};
    for (int64_t u = 0; u < c.taps[axis]; ++u) {
      if (cuts[i - 1] < inside[u].begin || cuts[i - 1] >= inside[u].end) continue;
      run.taps = {std::min(run.taps.begin, u), u + 1};
    }
    runs.push_back(run);
  }
  return runs;
}

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
  Unit made_for{};

  // Pixels for which the same taps are inside (corners, edges, the interior) by all their steps:
  // long sums, for the forward pass.
  void by_class(const Correlation& c, const std::vector<AxisRun> (&runs)[3], const Unit& unit,
                const SourceView& view, const StepOrder& order, int64_t width) {
    if (serve(unit)) return;
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
    if (serve(unit)) return;
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
  // Whether the products at hand are this unit's too, for offsets are from its first image; else
  // there are none any more.
  bool serve(const Unit& unit) {
    const Unit& m = made_for;
    if (m.z == unit.z && m.y == unit.y && m.x == unit.x && m.images == unit.images &&
        m.rows == unit.rows && m.columns == unit.columns) {
      return true;
    }
    made_for = unit;
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

// Columns of a weight's panel: whole vectors of output channels, three at a time, two where that
// leaves no single one over.
inline int64_t panel_width(int64_t channels, int64_t lanes) {
  const int64_t vectors = std::max<int64_t>(1, ceil_div(channels, lanes));
  return lanes * std::min<int64_t>(vectors, vectors % 3 == 1 ? 2 : 3);
}

}  // namespace fused
