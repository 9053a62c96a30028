// Products of few long rows that lie across a list: c = g Qᵀ in one pass, and c Q or g - c Q in another, float64 sums.
#pragma once

#include <cstdint>
#include <vector>

#include "element.h"

namespace mtu_fast::cpu {

struct Rows {
  char* data;
  int64_t step;  // bytes from one row to the next
  Element element;

  Row row(int64_t r) const { return {data + r * step, element}; }
};

struct Piece {
  Rows rows;      // K rows Q
  Rows vectors;   // M rows g; data may be null where only c Q is asked for
  Rows out;       // M rows
  int64_t columns;
  const double* weights;  // [M, K]
};

// The columns of all pieces, one after the other, are cut into chunks that do not depend on the number of threads.
class Projection {
 public:
  Projection(std::vector<Piece> pieces, int64_t rows, int64_t vectors);

  int64_t chunks() const { return chunks_; }
  int64_t work() const;  // multiply-adds of a chunk, in one of the passes

  // Passes over chunks begin .. end-1; calls for different chunks may run at once.
  void sum(int64_t begin, int64_t end);     // of g Qᵀ
  void expand(int64_t begin, int64_t end);  // out = g - weights Q, or weights Q without vectors

  // After all chunks were summed: c [M, K], their sums in order, become the weights; `into` forgets the vectors.
  void weigh(bool into);

 private:
  template <class Visit>
  void walk(int64_t chunk, Visit visit) const;

  std::vector<Piece> pieces_;
  std::vector<int64_t> starts_;  // of each piece among all columns
  int64_t rows_, vectors_, tile_, width_, chunks_;
  std::vector<double> sums_;  // [chunks, M, K]
};

}  // namespace mtu_fast::cpu
