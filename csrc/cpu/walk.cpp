#include "walk.h"

#include <algorithm>
#include <utility>

namespace mtu_fast::cpu {
namespace {

constexpr int64_t PADDED = 64;  // places of a box, for each pixel that it may reach: more are cut

int64_t product(const Sizes& sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) n *= size;
  return n;
}

// Coordinates below `sizes`, row by row.
template <class F>
void each(const Sizes& sizes, const F& visit) {
  Sizes at(sizes.size(), 0);
  for (int64_t left = product(sizes); left > 0; --left) {
    visit(at);
    for (size_t a = sizes.size(); a-- > 0;) {
      if (++at[a] < sizes[a]) break;
      at[a] = 0;
    }
  }
}

// `step`: from one element to the next where they come from.
void append(std::vector<Segment>& segments, int64_t from, int64_t to, int64_t length = 1, int64_t step = 1) {
  if (!segments.empty()) {
    Segment& last = segments.back();
    if (last.from + last.length * step == from && last.to + last.length == to) {
      last.length += length;
      return;
    }
  }
  segments.push_back({from, to, length});
}

// Where the padded box keeps a coordinate. Coordinates with the same remainder by the stride form a plane, so that the
// pixels under one tap at neighbouring positions are neighbours, whatever the stride.
struct Layout {
  Sizes stride, pitch, plane;
  int64_t size = 1;

  Layout(const Sizes& strides, const Sizes& extent) : stride(strides), pitch(extent.size()), plane(extent.size()) {
    for (size_t a = extent.size(); a-- > 0;) {
      pitch[a] = size;
      size *= (extent[a] + stride[a] - 1) / stride[a];
    }
    for (size_t a = extent.size(); a-- > 0;) {
      plane[a] = size;
      size *= stride[a];
    }
  }

  int64_t place(const Sizes& at) const {
    int64_t n = 0;
    for (size_t a = 0; a < at.size(); ++a) n += at[a] % stride[a] * plane[a] + at[a] / stride[a] * pitch[a];
    return n;
  }
};

int64_t extent_of(const Walk& walk, size_t axis, int64_t positions) {
  return (positions - 1) * walk.stride[axis] + (walk.kernel[axis] - 1) * walk.dilation[axis] + 1;
}

// Where an axis has one position, nothing is a stride apart: any stride is as good, and 1 takes the least room.
Sizes strides(const Walk& walk, const Sizes& positions) {
  Sizes found = walk.stride;
  for (size_t a = 0; a < found.size(); ++a) {
    if (positions[a] <= 1) found[a] = 1;
  }
  return found;
}

// Which coordinates of an axis some tap reaches from some of so many positions, padding not taken off.
std::vector<bool> reached(const Walk& walk, size_t axis, int64_t positions) {
  std::vector<bool> found(extent_of(walk, axis, positions), false);
  for (int64_t o = 0; o < positions; ++o) {
    for (int64_t k = 0; k < walk.kernel[axis]; ++k) found[o * walk.stride[axis] + k * walk.dilation[axis]] = true;
  }
  return found;
}

Box box(const Walk& walk, const Sizes& image, const Sizes& corner, const Sizes& size) {
  const size_t axes = image.size();
  Sizes extent(axes), begin(axes);
  std::vector<std::vector<int64_t>> used(axes);  // coordinates inside the image that some tap reaches
  for (size_t a = 0; a < axes; ++a) {
    extent[a] = extent_of(walk, a, size[a]);
    begin[a] = corner[a] * walk.stride[a] - walk.padding[a];
    const std::vector<bool> met = reached(walk, a, size[a]);
    for (int64_t c = std::max<int64_t>(0, -begin[a]); c < extent[a] && c + begin[a] < image[a]; ++c) {
      if (met[c]) used[a].push_back(c);
    }
  }
  const Layout layout(strides(walk, size), extent);
  Box out;
  out.padded = layout.size;
  std::vector<int64_t> number(layout.size, -1);  // of the pixel at a place

  Sizes counts(axes), at(axes);
  for (size_t a = 0; a < axes; ++a) counts[a] = used[a].size();
  each(counts, [&](const Sizes& i) {
    Sizes pixel(axes);
    for (size_t a = 0; a < axes; ++a) {
      at[a] = used[a][i[a]];
      pixel[a] = at[a] + begin[a];
    }
    const int64_t place = layout.place(at);
    number[place] = out.pixels.size();
    append(out.spread, out.pixels.size(), place);
    out.pixels.push_back(std::move(pixel));
  });
  each(walk.kernel, [&](const Sizes& k) {
    for (size_t a = 0; a < axes; ++a) at[a] = k[a] * walk.dilation[a];
    out.shift.push_back(layout.place(at));
  });
  each(size, [&](const Sizes& o) {
    int64_t first = 0;  // the place under the first tap, from which shifts are counted
    Sizes position(axes);
    for (size_t a = 0; a < axes; ++a) {
      first += o[a] * layout.pitch[a];
      position[a] = o[a] + corner[a];
    }
    append(out.gather, first, out.positions.size());
    out.positions.push_back(std::move(position));
    out.span = first + 1;
    for (int64_t shift : out.shift) out.pixel.push_back(number[first + shift]);
  });
  out.plain = out.shift.size() == 1 && out.pixels.size() == out.positions.size();
  return out;
}

// Whether so many positions reach more than `most` pixels, or so much padding that laying it out is most of the work.
bool too_large(const Walk& walk, const Sizes& image, const Sizes& size, int64_t most) {
  int64_t pixels = 1, padded = 1;
  for (size_t a = 0; a < size.size(); ++a) {
    pixels *= std::min(image[a], extent_of(walk, a, size[a]));
    padded *= extent_of(walk, a, size[a]);
  }
  return pixels > most || padded > PADDED * most;
}

}  // namespace

std::vector<Tap> taps(const Walk& walk, const Sizes& image, const Sizes& grid, const Sizes& pitch) {
  const size_t last = grid.size() - 1;
  const int64_t stride = walk.stride[last];
  Sizes lines = grid;
  lines[last] = 1;
  std::vector<Tap> found;
  each(walk.kernel, [&](const Sizes& at) {
    Tap tap{{}, pitch[last] * stride};
    Sizes first(grid.size());  // the pixel under the first position; what lies outside has no segment
    for (size_t a = 0; a <= last; ++a) first[a] = at[a] * walk.dilation[a] - walk.padding[a];
    const auto below = [&](int64_t pixel) {  // positions of a line before that pixel
      return std::min(grid[last], std::max<int64_t>(0, (pixel - first[last] + stride - 1) / stride));
    };
    const int64_t begin = below(0), end = std::max(begin, below(image[last]));
    int64_t to = 0;
    each(lines, [&](const Sizes& line) {
      int64_t from = (first[last] + begin * stride) * pitch[last];
      bool inside = begin < end;
      for (size_t a = 0; a < last; ++a) {
        const int64_t pixel = first[a] + line[a] * walk.stride[a];
        inside &= 0 <= pixel && pixel < image[a];
        from += pixel * pitch[a];
      }
      tap.whole &= inside && end - begin == grid[last];
      if (inside) append(tap.segments, from, to + begin, end - begin, tap.step);
      to += grid[last];
    });
    found.push_back(std::move(tap));
  });
  return found;
}

Padded padded(const Walk& walk, const Sizes& image, const Sizes& grid, const Sizes& pitch, const Sizes& grid_pitch) {
  Padded out;
  if (product(grid) == 0) return out;
  const size_t axes = grid.size(), last = axes - 1;
  const Sizes by = strides(walk, grid);
  const int64_t stride = by[last];
  Sizes extent(axes), at(axes);
  std::vector<std::vector<bool>> met(axes);
  for (size_t a = 0; a < axes; ++a) {
    extent[a] = extent_of(walk, a, grid[a]);
    met[a] = reached(walk, a, grid[a]);
  }
  const Layout layout(by, extent);
  out.step = stride * pitch[last];
  out.grid_step = grid_pitch[last];
  out.size = layout.size;
  out.span = 1;
  for (size_t a = 0; a < axes; ++a) out.span += (grid[a] - 1) * layout.pitch[a];
  each(walk.kernel, [&](const Sizes& tap) {
    for (size_t a = 0; a < axes; ++a) at[a] = tap[a] * walk.dilation[a];
    out.shift.push_back(layout.place(at));
  });
  Sizes lines = extent;
  lines[last] = std::min(stride, extent[last]);
  each(lines, [&](const Sizes& line) {  // its pixels lie a stride apart along the last axis
    int64_t from = 0;
    for (size_t a = 0; a < last; ++a) {
      const int64_t pixel = line[a] - walk.padding[a];
      if (!met[a][line[a]] || pixel < 0 || pixel >= image[a]) return;
      from += pixel * pitch[a];
    }
    // What no tap reaches stays zero: it must not meet the zeros between positions.
    int64_t to = layout.place(line);
    for (int64_t c = line[last]; c < extent[last]; c += stride, ++to) {
      const int64_t pixel = c - walk.padding[last];
      if (met[last][c] && 0 <= pixel && pixel < image[last]) {
        append(out.pixels, from + pixel * pitch[last], to, 1, out.step);
      }
    }
  });
  Sizes rows = grid;
  rows[last] = 1;  // positions of a line are one segment
  each(rows, [&](const Sizes& row) {
    int64_t from = 0, to = 0;
    for (size_t a = 0; a < last; ++a) {
      from += row[a] * grid_pitch[a];
      to += row[a] * layout.pitch[a];
    }
    append(out.positions, from, to, grid[last], out.grid_step);
  });
  return out;
}

std::vector<Box> boxes(const Walk& walk, const Sizes& image, const Sizes& grid, int64_t most) {
  std::vector<Box> found;
  if (product(grid) == 0) return found;
  Sizes size = grid, counts(grid.size());
  // halving the longest axis keeps boxes near to cubes, whose rims overlap least
  while (too_large(walk, image, size, most) && product(size) > 1) {
    int64_t& longest = *std::max_element(size.begin(), size.end());
    longest = (longest + 1) / 2;
  }
  for (size_t a = 0; a < grid.size(); ++a) counts[a] = (grid[a] + size[a] - 1) / size[a];
  each(counts, [&](const Sizes& at) {
    Sizes corner(at.size()), part(at.size());
    for (size_t a = 0; a < at.size(); ++a) {
      corner[a] = at[a] * size[a];
      part[a] = std::min(size[a], grid[a] - corner[a]);
    }
    found.push_back(box(walk, image, corner, part));
  });
  return found;
}

}  // namespace mtu_fast::cpu
