// Rows that are the weight gradients of a convolution whose groups have few channels, a depthwise one above all:
//
//     row r [o, c, δ] = Σ_{frames, p} x_r[group of o, c](p + δ) · b_r[o](p)
//
// Sums are float32, or float64 where an element is.
#pragma once

#include <cstdint>

#include "block.h"

namespace mtu_fast::cpu {

class Grouped {
 public:
  // Images x [rows, frames, channels, *image] that a kernel walks over, and gradients b [rows, frames, channels, *grid].
  Grouped(const Block& x, const Block& b, int64_t groups, const Walk& walk);

  int64_t parts() const { return x_.size[0] * groups_ * slices_; }  // some output channels of a row's group each
  int64_t work() const;                                   // multiply-adds of a part, about
  bool is_double() const { return x_.element == Element::Double || b_.element == Element::Double; }

  // Adds parts of rows [rows, channels of b, channels of x a group, *kernel], float64 or float32.
  void form(int64_t begin, int64_t end, void* rows) const;

 private:
  Block x_, b_;
  int64_t groups_, inputs_, outputs_;  // channels of a group
  int64_t slices_ = 1;                 // of the output channels of a group
  Padded box_;
};

}  // namespace mtu_fast::cpu
