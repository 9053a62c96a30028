// G = J Jᵀ of explicit rows, in one pass over them, with float64 sums.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "element.h"
#include "many.h"

namespace mtu_fast::cpu {

// Products of all pairs of rows, summed in slots of their own, so that threads do not meet.
class RowSums {
 public:
  // Products of the last `known` rows with one another are left out: zeros.
  RowSums(int64_t rows, int64_t known);

  static int64_t pairs(int64_t rows);  // of rows that are multiplied, about

  void resize(int64_t slots);

  struct Room {  // to work in, of one object: a tile, then sums by lane; or what many rows need
    std::unique_ptr<Line[]> lines;
    int64_t tile = -1;  // lines of it
    ManyRows::Room many;
  };

  // Adds the products over columns begin .. end-1; calls for different slots may run at once, in rooms of their own.
  void add(int64_t slot, const std::vector<Row>& rows, int64_t begin, int64_t end, Room& room);

  // The slots' sums in order, so that the result has the same bits whatever the threads. gram is [R, R].
  void write(double* gram);

 private:
  int64_t size() const;  // of a slot

  int64_t rows_, fresh_, slots_ = 0;  // fresh_: rows before the known ones
  ManyRows many_;
  std::vector<double> sums_;
};

class RowGram {
 public:
  RowGram(std::vector<Row> rows, int64_t columns, int64_t known);

  int64_t chunks() const { return chunks_; }
  int64_t work() const;  // multiply-adds of a chunk

  // Sums chunks begin .. end-1; calls for different chunks may run at once.
  void sum(int64_t begin, int64_t end);

  // After all chunks.
  void write(double* gram) { sums_.write(gram); }

 private:
  std::vector<Row> rows_;
  int64_t columns_, width_, chunks_;  // the columns are cut into chunks that do not depend on the number of threads
  RowSums sums_;
};

// One side of rows left ⊗ right: the Gram of its distinct rows, [rows, rows], and where blocks of all rows are in it.
struct Factor {
  struct Block {
    int64_t row, at, count;  // rows row .. row + count - 1 are the distinct ones from `at` on
  };
  std::vector<Block> blocks;
  std::vector<double> gram;
  int64_t rows = 0;
};

// gram[r, q] += (left_r · left_q) (right_r · right_q) for rows r of begin .. end-1 and all q; gram is [R, R].
void add_hadamard(const Factor& left, const Factor& right, int64_t R, int64_t begin, int64_t end, double* gram);

}  // namespace mtu_fast::cpu
