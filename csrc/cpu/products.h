// Products of positions, eight by eight, float64: what the ghost Grams are made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "block.h"

namespace mtu_fast::cpu {

constexpr int64_t DEPTH = 256;  // channels multiplied at once: eight positions are 16 KiB

// Positions of a block as they are multiplied, eight to a panel: [channel / DEPTH][panel][channel % DEPTH][position].
struct Panels {
  const Block* block;
  int64_t channels = 0;
  std::vector<int64_t> offset;  // of each position in the block, -1 for what fills up a panel
  std::unique_ptr<Line[]> lines;

  int64_t count() const { return offset.size() / LANES; }
  double* at(int64_t channel, int64_t panel) const {  // channel: a multiple of DEPTH
    return lines[channel * count() + panel * std::min(DEPTH, channels - channel)].lane;
  }
};

struct Matrix {  // consecutive panels of a side
  const Panels& side;
  int64_t first, count;
};

struct PositionRows {
  const std::vector<int64_t>&left, &right;  // of each position
  int64_t width;                            // right rows: sums are [left row][right row]
};

// For the best instruction set of the machine; what they compute is said where they are defined.
struct Products {
  void (*turn)(const Row* rows, int64_t count, int64_t start, int64_t columns, double* to);
  void (*widen)(const Panels& side, int64_t panel);
  void (*multiply)(const Matrix& left, const Matrix& right, bool diagonal, double* out, int64_t ld);
  void (*add)(const double* const* from, int64_t count, int64_t length, double* to);
  void (*sum)(const double* x, const double* b, int64_t ld, const PositionRows& rows, bool diagonal, double* sums);
};

const Products& products();

}  // namespace mtu_fast::cpu
