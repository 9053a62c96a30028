#include "many.h"

#include <algorithm>

namespace mtu_fast::cpu {

ManyRows::ManyRows(int64_t rows, int64_t fresh)
    : rows_(rows), fresh_(fresh), panels_(round_up(rows, LANES) / LANES), fresh_panels_(round_up(fresh, LANES) / LANES) {}

int64_t ManyRows::place(int64_t panel) const {
  const int64_t few = std::min(panel, fresh_panels_);  // each of which meets one more
  return LANES * LANES * (few * (few + 1) / 2 + (panel - few) * fresh_panels_);
}

void ManyRows::add(const std::vector<Row>& rows, int64_t begin, int64_t end, Room& room, double* sums) const {
  Panels& tile = room.tile;
  tile.offset.resize(panels_ * LANES);  // of its length alone: the tile is written here, and no pixel is looked up
  if (!tile.lines) tile.lines.reset(new Line[panels_ * DEPTH]);
  room.block.resize(LANES * LANES * fresh_panels_);
  for (int64_t start = begin; start < end; start += DEPTH) {
    const int64_t columns = std::min(DEPTH, end - start);
    tile.channels = round_up(columns, LANES);
    for (int64_t j = 0; j < panels_; ++j) {
      const int64_t first = j * LANES;
      products().turn(rows.data() + first, std::min(LANES, rows_ - first), start, columns, tile.at(0, j));
    }
    for (int64_t j = 0; j < panels_; ++j) {
      const int64_t wide = left(j) * LANES;
      products().multiply({tile, 0, left(j)}, {tile, j, 1}, false, room.block.data(), wide);
      double* to = sums + place(j);
      for (int64_t k = 0; k < LANES * wide; ++k) to[k] += room.block[k];
    }
  }
}

void ManyRows::write(const double* sums, double* gram) const {
  for (int64_t j = 0; j < rows_; ++j) {
    const int64_t panel = j / LANES;
    const double* met = sums + place(panel) + j % LANES * left(panel) * LANES;
    for (int64_t i = 0; i <= j; ++i) gram[i * rows_ + j] = gram[j * rows_ + i] = i < fresh_ ? met[i] : 0.0;
  }
}

}  // namespace mtu_fast::cpu
