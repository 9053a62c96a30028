// How a convolution walks over its output positions: tap by tap, as stretches of memory, or over a box of them, as tables
// of places.
//
// Pixels that a tap of a box reaches are numbered in the order of memory. To add up shifted images by long vectors,
// they are also placed in a padded box, where a tap is one and the same distance from every position:
//
//     coordinate c of an axis (padding and the box's corner taken off)  ->  plane c % stride, place c / stride
//
// Planes come first, then places row by row.
#pragma once

#include <cstdint>
#include <vector>

namespace mtu_fast::cpu {

using Sizes = std::vector<int64_t>;  // one number an axis

struct Walk {
  Sizes kernel, stride, padding, dilation;
};

struct Segment {  // consecutive in two numberings at once
  int64_t from, to, length;
};

struct Box {
  std::vector<Sizes> pixels;     // image coordinates of the pixels that are used
  std::vector<Sizes> positions;  // output coordinates, row by row
  std::vector<Segment> spread;   // pixels -> padded box
  std::vector<Segment> gather;   // padded box, from the place of the first position -> positions
  std::vector<int64_t> shift;    // of each tap, in the padded box
  std::vector<int64_t> pixel;    // [position][tap]: the pixel under it, -1 outside the image
  int64_t padded = 0, span = 0;  // size of the padded box; places from the first position to the last
  bool plain = false;            // one tap, on every position a pixel of its own: nothing is shifted
};

// How positions lie in memory, seen through one tap: position to + i at from + i * step, row by row.
struct Tap {
  std::vector<Segment> segments;
  int64_t step = 1;
  bool whole = true;  // no position lies outside the image
};

// An image and its output grid as they lie in one padded box.
struct Padded {
  std::vector<Segment> pixels;     // image -> box; from one pixel to the next lie `step` elements
  std::vector<Segment> positions;  // grid -> box; one position to the next: `grid_step`
  std::vector<int64_t> shift;      // of each tap
  int64_t step = 1, grid_step = 1, size = 0, span = 0;  // size of the box; places from the first position to the last
};

// One for every tap; pitch: elements from one pixel to the next along an axis. There is an axis at least.
std::vector<Tap> taps(const Walk& walk, const Sizes& image, const Sizes& grid, const Sizes& pitch);

// pitch, grid_pitch: elements from one pixel, or position, to the next along an axis. There is an axis at least.
Padded padded(const Walk& walk, const Sizes& image, const Sizes& grid, const Sizes& pitch, const Sizes& grid_pitch);

// Cuts an output grid into boxes that reach about `most` pixels of the image at most, or one position each.
std::vector<Box> boxes(const Walk& walk, const Sizes& image, const Sizes& grid, int64_t most);

}  // namespace mtu_fast::cpu
