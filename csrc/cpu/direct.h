// G = J Jᵀ of rows that are sums over positions, formed a tile of columns at a time and multiplied while in cache:
//
//     row r = Σ_s left[r, s] ⊗ right[r, s]
//
// or of sums of such rows, which are added up while they are formed.
// The sums over positions are float32, or float64 where an element is; those of the products of rows are float64.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gram.h"
#include "side.h"

namespace mtu_fast::cpu {

class Direct {
 public:
  struct Pair {  // the tensors that a block of rows is made of
    int64_t x, b;
  };

  // Images x [rows, frames, channels, *image] that a kernel walks over, and gradients b [rows, frames, channels, *grid].
  // Tensors that occur more than once are given once: pairs say which ones each block of rows is made of. `into` is the
  // row of G that each row is added to, -1 for none; empty where every row is one of G.
  Direct(const std::vector<Block>& x, const std::vector<Block>& b, const std::vector<Pair>& pairs, const Walk& walk,
         const std::vector<int64_t>& into = {});

  int64_t wide_rows() const { return slots_ == 0 ? 0 : wide_.rows.size(); }
  int64_t width() const;  // elements of a wide row, about
  int64_t slots() const { return slots_; }
  int64_t work() const;  // multiply-adds of a slot, about

  // First pack all wide rows, then sum all slots, then write; calls for different ranges may run at once.
  void pack(int64_t begin, int64_t end);
  void sum(int64_t begin, int64_t end);
  void write(double* gram) { sums_.write(gram); }

 private:
  template <class T>
  void plan();
  template <class T>
  void pack_as(int64_t begin, int64_t end);
  template <class T>
  void sum_as(int64_t begin, int64_t end);
  template <class T>
  void form_tile(int64_t top, int64_t down, int64_t left, int64_t across, T* panels, T* tile) const;

  struct Use {  // of a row of the tall side
    int64_t row, wide;  // of G, of the wide side
    bool adds = false;  // to what another use left in the row
  };
  Side tall_, wide_;  // columns of the one are multiplied by vectors of columns of the other
  std::vector<std::vector<Use>> uses_;
  int64_t rows_ = 0, positions_ = 0;  // of G; of all rows together
  bool is_double_ = false;            // rows are float64
  int64_t tall_panels_ = 0, wide_panels_ = 0, down_ = 1, across_ = 1, slots_ = 0;  // a tile: down by across panels
  std::unique_ptr<Line[]> packed_;  // [row][panel][position][column] of the wide side
  RowSums sums_{0, 0};
};

}  // namespace mtu_fast::cpu
