// G = J Jᵀ of convolution weight gradients from products of positions, without rows and without the patches:
//
//     G[r, q] = Σ_{p,s} (Σ_δ x_r(p+δ) · x_q(s+δ)) (b_r(p) · b_q(s))
//
// A sum of outer products is the case without axes: frames are its positions, each an image of one pixel.
#pragma once

#include <cstdint>
#include <vector>

#include "products.h"
#include "walk.h"

namespace mtu_fast::cpu {

// All pairs of tiles i <= j are multiplied, each apart from the others; the sums of a pair are its own.
class Ghost {
 public:
  // Blocks of one family are told apart by b alone.
  struct Family {
    Block x;
    std::vector<Block> b;
    std::vector<int64_t> start;  // of each b's rows in G
  };

  Ghost(std::vector<Family> families, const Walk& walk);

  int64_t panels() const { return panels_; }
  int64_t pairs() const { return pairs_.size(); }
  int64_t work() const;  // multiply-adds of a pair, about

  // First widen all panels, then multiply all pairs, then write; calls for different ranges may run at once.
  void widen(int64_t begin, int64_t end);
  void multiply(int64_t begin, int64_t end);
  void write(double* gram, int64_t rows) const;

 private:
  struct Tile {  // whole boxes of consecutive images
    int64_t family, box, images;
    int64_t pixels, positions;            // how many
    int64_t pixel_panel, position_panel;  // where they start
    int64_t first_row, rows;
    std::vector<int64_t> row;  // of each position, counted from the first
  };
  struct Pair {
    int64_t left, right, sums;  // tiles, and where their sums start
  };
  struct Scratch;

  void add_tiles(int64_t family);
  void multiply(const Pair& pair, Scratch& scratch);
  void add_patches(const Tile& left, const Tile& right, bool diagonal, Scratch& scratch) const;
  const Box& box(const Tile& tile) const { return boxes_[tile.family][tile.box]; }
  const Panels& side(int64_t family, int64_t b) const { return sides_[first_side_[family] + b]; }

  std::vector<Family> families_;
  std::vector<std::vector<Box>> boxes_;  // of each family
  std::vector<Panels> sides_;            // of each family: x, then every b
  std::vector<int64_t> first_side_;
  std::vector<Tile> tiles_;
  std::vector<Pair> pairs_;
  std::vector<double> sums_;  // of each pair: [b of the left][b of the right][row][row]
  int64_t tile_ = 0, panels_ = 0;
};

}  // namespace mtu_fast::cpu
