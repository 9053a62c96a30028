// One side of a sum over positions, Σ_s left[r, s] ⊗ right[r, s]: its rows, and panels of its columns as they are multiplied.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "block.h"

namespace mtu_fast::cpu {

struct Side {  // columns: taps under each channel, channel by channel
  struct Row {
    const void* data;
    Element element;
    int64_t step;              // from channel to channel
    int64_t block;             // whose taps it has
    int64_t positions, first;  // how many, and how many those of the rows before
  };
  std::vector<Row> rows;
  std::vector<std::vector<Tap>> taps;  // of each block
  int64_t channels = 0, columns = 0, positions = 0;
};

struct Sides {
  Side x, b;
};

// Images x [rows, frames, channels, *image] that a kernel walks over, on one grid for each, and gradients b [rows,
// frames, channels, *grid]; grids: which block of b has the grid of each block of x.
Sides sides(const std::vector<Block>& x, const std::vector<Block>& b, const std::vector<int64_t>& grids, const Walk& walk);

// Whether sums are float64, not float32: where an element is.
bool is_double(const Side& side);

// Positions start .. start+count-1 of a panel's columns, [position][column]; zeros for what is not there.
template <int64_t COLUMNS, class E, class T>
MTU_FAST_INLINE void lay_out_from(const E* data, const Side& side, const Side::Row& row, int64_t first, int64_t start,
                                  int64_t count, T* to) {
  const std::vector<Tap>& taps = side.taps[row.block];
  const int64_t columns = std::min(COLUMNS, side.columns - first), kernel = taps.size();
  const bool whole = columns == COLUMNS && std::all_of(taps.begin(), taps.end(), [](const Tap& tap) { return tap.whole; });
  if (!whole) std::fill(to, to + count * COLUMNS, T{});
  const bool together = kernel == 1 && row.step == 1 && columns == COLUMNS;  // columns are neighbours in memory
  for (int64_t l = 0; l < columns; l += together ? COLUMNS : 1) {
    const Tap& tap = taps[(first + l) % kernel];
    const E* own = data + (first + l) / kernel * row.step;
    const auto begin = std::partition_point(tap.segments.begin(), tap.segments.end(),
                                            [&](const Segment& part) { return part.to + part.length <= start; });
    for (auto part = begin; part != tap.segments.end() && part->to < start + count; ++part) {
      const int64_t skip = std::max<int64_t>(0, start - part->to), at = part->to + skip - start;
      const int64_t length = std::min(part->length - skip, count - at), step = tap.step;
      const E* from = own + part->from + skip * step;
      T* there = to + at * COLUMNS + l;
      if (together) {
        for (int64_t i = 0; i < length; ++i) {
          for (int64_t k = 0; k < COLUMNS; ++k) there[i * COLUMNS + k] = wide(from[i * step + k]);
        }
      } else if (step == 1) {
        for (int64_t i = 0; i < length; ++i) there[i * COLUMNS] = wide(from[i]);
      } else {
        for (int64_t i = 0; i < length; ++i) there[i * COLUMNS] = wide(from[i * step]);
      }
    }
  }
}

template <int64_t COLUMNS, class T>
MTU_FAST_INLINE void lay_out(const Side& side, const Side::Row& row, int64_t first, int64_t start, int64_t count, T* to) {
  const auto from = [&](const auto* data) { lay_out_from<COLUMNS>(data, side, row, first, start, count, to); };
  switch (row.element) {
    case Element::Double: return from(static_cast<const double*>(row.data));
    case Element::Float: return from(static_cast<const float*>(row.data));
    case Element::BFloat16: return from(static_cast<const BFloat16*>(row.data));
    case Element::Half: return from(static_cast<const Half*>(row.data));
  }
}

}  // namespace mtu_fast::cpu
