// G = J Jᵀ of explicit rows, in one pass over them, with float64 sums.
#pragma once

#include <cstdint>
#include <vector>

#include "element.h"

namespace mtu_fast::cpu {

// The columns are cut into chunks that do not depend on the number of threads; each has its own sums.
class RowGram {
 public:
  // Products of the last `known` rows with one another are left out: zeros.
  RowGram(std::vector<Row> rows, int64_t columns, int64_t known);

  int64_t chunks() const { return chunks_; }
  int64_t work() const;  // multiply-adds of a chunk

  // Sums chunks begin .. end-1; calls for different chunks may run at once.
  void sum(int64_t begin, int64_t end);

  // After all chunks: their sums in order, so that the result has the same bits whatever the threads. gram is [R, R].
  void write(double* gram);

 private:
  std::vector<Row> rows_;
  int64_t columns_, fresh_, groups_, width_, chunks_;  // fresh_: rows before the known ones
  std::vector<double> sums_;
};

}  // namespace mtu_fast::cpu
