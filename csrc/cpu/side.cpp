// Where the rows and columns of a side lie.

#include "side.h"

namespace mtu_fast::cpu {
namespace {

Sizes joined(int64_t first, Sizes::const_iterator begin, Sizes::const_iterator end) {
  Sizes found(1 + (end - begin), first);
  std::copy(begin, end, found.begin() + 1);
  return found;
}

Sizes joined(int64_t first, const Sizes& rest) { return joined(first, rest.begin(), rest.end()); }

Sizes grid_of(const Block& block) { return joined(block.size[1], block.size.begin() + 3, block.size.end()); }

// Frames are an axis that every kernel walks over one by one.
Walk over_frames(const Walk& walk) {
  return {joined(1, walk.kernel), joined(1, walk.stride), joined(0, walk.padding), joined(1, walk.dilation)};
}

// One tap, on every position.
Walk over_positions(size_t axes) { return {Sizes(axes, 1), Sizes(axes, 1), Sizes(axes, 0), Sizes(axes, 1)}; }

int64_t bytes(Element element) {
  switch (element) {
    case Element::Double: return 8;
    case Element::Float: return 4;
    default: return 2;
  }
}

Side side_of(const std::vector<Block>& blocks, const std::vector<Sizes>& grids, const Walk& walk) {
  Side side;
  for (size_t n = 0; n < blocks.size(); ++n) {
    const Block& block = blocks[n];
    const Sizes pitch = joined(block.stride[1], block.stride.begin() + 3, block.stride.end());
    side.taps.push_back(taps(walk, grid_of(block), grids[n], pitch));
    int64_t positions = 1;
    for (int64_t size : grids[n]) positions *= size;
    const auto* data = static_cast<const char*>(block.data);
    for (int64_t r = 0; r < block.size[0]; ++r, side.positions += positions) {
      side.rows.push_back({data + r * block.stride[0] * bytes(block.element), block.element, block.stride[2],
                           static_cast<int64_t>(n), positions, side.positions});
    }
  }
  side.channels = blocks[0].size[2];
  side.columns = side.channels * side.taps[0].size();
  return side;
}

}  // namespace

Sides sides(const std::vector<Block>& x, const std::vector<Block>& b, const std::vector<int64_t>& grids, const Walk& walk) {
  std::vector<Sizes> of_x, of_b;
  for (const Block& block : b) of_b.push_back(grid_of(block));
  for (int64_t block : grids) of_x.push_back(of_b[block]);
  return {side_of(x, of_x, over_frames(walk)), side_of(b, of_b, over_positions(1 + walk.kernel.size()))};
}

bool is_double(const Side& side) {
  return std::any_of(side.rows.begin(), side.rows.end(),
                     [](const Side::Row& row) { return row.element == Element::Double; });
}

}  // namespace mtu_fast::cpu
