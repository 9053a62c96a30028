// Products of many rows, by panels of eight: a tile of columns is widened and turned once,
//
//     tile[panel][column][row in the panel]
//
// and a panel is multiplied with all before it, eight rows by 24 in registers. Panels of known rows do not meet.
#pragma once

#include <cstdint>
#include <vector>

#include "element.h"
#include "products.h"

namespace mtu_fast::cpu {

// Sums of R rows, of which `fresh` meet all and the others only those: for each panel one block [row in it][row before].
class ManyRows {
 public:
  ManyRows(int64_t rows, int64_t fresh);

  int64_t sums() const { return place(panels_); }  // numbers

  struct Room {  // to work in, of one object
    Panels tile;
    std::vector<double> block;
  };

  // sums += the products over columns begin .. end-1
  void add(const std::vector<Row>& rows, int64_t begin, int64_t end, Room& room, double* sums) const;

  // gram is [R, R]
  void write(const double* sums, double* gram) const;

 private:
  int64_t left(int64_t panel) const { return std::min(fresh_panels_, panel + 1); }  // panels that it meets
  int64_t place(int64_t panel) const;                                              // of its block

  int64_t rows_, fresh_, panels_, fresh_panels_;
};

}  // namespace mtu_fast::cpu
