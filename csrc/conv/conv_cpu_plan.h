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

}  // namespace fused
