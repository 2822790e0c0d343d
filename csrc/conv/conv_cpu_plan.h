// How the CPU engines cut a correlation into units of work: what a unit covers, and where in its
// tile each tap reads. Plain C++, decided once per call from the shape alone, so that a result does
// not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "conv/correlation.h"

namespace fused {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Destination positions of a unit: `images` images, one depth, `rows` rows, `columns` columns.
struct UnitShape {
  int64_t images, rows, columns;
};

// One unit: its first position and how much of the unit's shape lies inside.
struct Unit {
  int64_t image, z, y, x;
  int64_t images, rows, columns;
};

// Numbers the units of a correlation, columns fastest.
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
    u.x = index % blocks_x * shape.columns;
    index /= blocks_x;
    u.y = index % blocks_y * shape.rows;
    index /= blocks_y;
    u.z = index % count[0];
    u.image = index / count[0] * shape.images;
    u.images = std::min(shape.images, batch - u.image);
    u.rows = std::min(shape.rows, count[1] - u.y);
    u.columns = std::min(shape.columns, count[2] - u.x);
    return u;
  }
};

// About `target` positions in whole rows, whole images where they are small.
inline UnitShape unit_shape(const int32_t* count, int64_t batch, int64_t target) {
  UnitShape unit{1, 1, std::min<int64_t>(count[2], target)};
  if (unit.columns < count[2]) return unit;
  unit.rows = std::min<int64_t>(count[1], std::max<int64_t>(1, target / unit.columns));
  if (unit.rows < count[1] || count[0] > 1) return unit;
  unit.images = std::min(batch, std::max<int64_t>(1, target / (unit.rows * unit.columns)));
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

inline int64_t num_taps(const Correlation& c) { return int64_t{c.taps[0]} * c.taps[1] * c.taps[2]; }

// One past the highest element that the correlation's source has.
inline int64_t source_end(const Correlation& c) {
  int64_t last = (c.batch - 1) * c.source_stride.outer +
                 (int64_t{c.groups} * c.depth - 1) * c.source_stride.channel;
  for (int axis = 0; axis < 3; ++axis) {
    last += (c.source_size[axis] - 1) * c.source_stride.space[axis];
  }
  return last + 1;
}

// Tiles stay well inside a second-level cache (elements).
constexpr int64_t kTileElements = 48 * 1024;

// The source of a correlation as the left side of a matrix product: an element is found through two
// tables, where a destination pixel begins and where each (channel, tap) lies from there. With
// padding the tables speak of a tile with zeros around it, else of the source itself.

struct GatherPlan {
  UnitGrid units;
  bool direct;                       // the source is read where it is
  bool by_channel;                   // the tile's fastest axis: channel or x, as in the source
  int64_t chunk;                     // channels in a tile
  int64_t lowest[3], size[3];        // of the tile: first position from the unit's, extent
  int64_t image, space[3], channel;  // strides of the tile, or of the source
  int64_t tile_size;
  std::vector<int64_t> offsets;  // [channel][tap] from where a pixel begins

  static GatherPlan make(const Correlation& c, int64_t target_pixels, bool source_as_is,
                         int64_t max_chunk = INT64_MAX) {
    GatherPlan p{UnitGrid(unit_shape(c.count, c.batch, target_pixels), c.batch, c.count)};
    p.direct = source_as_is && reads_inside(c);
    p.by_channel = c.source_stride.channel == 1;
    const UnitShape& unit = p.units.shape;
    const int64_t extent[3] = {1, unit.rows, unit.columns};
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t reach = int64_t{c.tap_step[axis]} * (c.taps[axis] - 1);
      p.lowest[axis] = std::min<int64_t>(0, reach);
      p.size[axis] = (extent[axis] - 1) * c.step[axis] + std::abs(reach) + 1;
    }
    const int64_t positions = unit.images * p.size[0] * p.size[1] * p.size[2];
    p.chunk = p.direct ? c.depth : std::min<int64_t>(c.depth, kTileElements / positions);
    p.chunk = std::max<int64_t>(1, std::min(p.chunk, max_chunk));
    p.tile_size = p.direct ? 1 : positions * p.chunk;
    if (p.direct) {
      p.image = c.source_stride.outer;
      p.channel = c.source_stride.channel;
      std::copy(c.source_stride.space, c.source_stride.space + 3, p.space);
    } else {
      p.channel = p.by_channel ? 1 : positions;
      p.space[2] = p.by_channel ? p.chunk : 1;
      p.space[1] = p.space[2] * p.size[2];
      p.space[0] = p.space[1] * p.size[1];
      p.image = p.space[0] * p.size[0];
    }
    p.list_offsets(c);
    return p;
  }

  void list_offsets(const Correlation& c) {
    for (int64_t d = 0; d < std::min<int64_t>(chunk, c.depth); ++d) {
      for (int64_t w = 0; w < c.taps[0]; ++w) {
        for (int64_t v = 0; v < c.taps[1]; ++v) {
          for (int64_t u = 0; u < c.taps[2]; ++u) {
            offsets.push_back(d * channel + (c.tap_step[0] * w - lowest[0]) * space[0] +
                              (c.tap_step[1] * v - lowest[1]) * space[1] +
                              (c.tap_step[2] * u - lowest[2]) * space[2]);
          }
        }
      }
    }
  }

  // Where each pixel of a unit begins, in the tile or in the source, and in the destination.
  void list_pixels(const Correlation& c, const Unit& unit, std::vector<int64_t>& source,
                   std::vector<int64_t>& dest) const {
    source.clear();
    dest.clear();
    for (int64_t i = 0; i < unit.images; ++i) {
      for (int64_t y = 0; y < unit.rows; ++y) {
        for (int64_t x = 0; x < unit.columns; ++x) {
          source.push_back(i * image + y * c.step[1] * space[1] + x * c.step[2] * space[2]);
          dest.push_back((unit.image + i) * c.dest_stride.outer + unit.z * c.dest_stride.space[0] +
                         (unit.y + y) * c.dest_stride.space[1] +
                         (unit.x + x) * c.dest_stride.space[2]);
        }
      }
    }
  }
};

}  // namespace fused
