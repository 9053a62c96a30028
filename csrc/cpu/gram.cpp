// Rows go by groups of four. A tile of columns is widened to float64 once, laid out as it is read,
//
//     tile[group][column / 8][row in the group][column % 8]
//
// and every pair of groups i <= j multiplies its 4 x 4 pairs of rows over the tile: 16 sums in registers, each a vector
// over columns. Their lanes are added up at the end; where those of all pairs would fill a cache, rows are multiplied as
// in many.h. The tile stays in the nearest caches; rows are read once, ahead of their use. What fills up the last group
// only meets itself and sums that are not written. Groups of known rows do not meet one another.

#include "gram.h"

#include <algorithm>
#include <utility>

namespace mtu_fast::cpu {
namespace {

constexpr int64_t GROUP = 4;  // rows
constexpr int64_t STEP = GROUP * LANES;
constexpr int64_t PAIRS = GROUP * GROUP;
constexpr int64_t KEPT = 4096;         // most pairs of rows whose lanes are kept: 256 KiB
constexpr int64_t TILE = 128;          // columns, a group is 4 KiB
constexpr int64_t AHEAD = 4 * TILE;    // columns between those that are widened and those that are fetched
constexpr int64_t CHUNK = 4096;        // least columns of a chunk, where rows are few
constexpr int64_t WORK = 500'000;      // its least products, where they are many: about 25 us
constexpr int64_t CHUNK_PER_ROW = 16;  // least columns a row: all sums are a 16th of float32 rows,
constexpr int64_t SMALL = 1 << 17;     // or so many numbers, 1 MiB, if that is more
constexpr int64_t CHUNKS = 64;         // most chunks

// sums[a][b][lane] += products of a's row and b's row over the tile. WIDTH lanes and HEIGHT rows of a at a time, as
// registers allow.
template <int WIDTH, int HEIGHT, bool DIAGONAL>
MTU_FAST_INLINE void multiply(const double* a, const double* b, int64_t steps, double* sums) {
  typedef double Vector __attribute__((vector_size(WIDTH * sizeof(double)), may_alias));
  for (int top = 0; top < GROUP; top += HEIGHT, sums += HEIGHT * GROUP * WIDTH) {
    Vector part[HEIGHT][GROUP];
    for (int i = 0; i < HEIGHT; ++i) {
      for (int j = 0; j < GROUP; ++j) part[i][j] = *reinterpret_cast<const Vector*>(sums + (i * GROUP + j) * WIDTH);
    }
    for (int64_t k = 0; k < steps * STEP; k += STEP) {
#pragma GCC unroll 8
      for (int l = 0; l < LANES; l += WIDTH) {
#pragma GCC unroll 8
        for (int i = 0; i < HEIGHT; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < GROUP; ++j) {
            if (DIAGONAL && HEIGHT == GROUP && j < i) continue;
            part[i][j] += *reinterpret_cast<const Vector*>(a + k + (top + i) * LANES + l) *
                          *reinterpret_cast<const Vector*>(b + k + j * LANES + l);
          }
        }
      }
    }
    for (int i = 0; i < HEIGHT; ++i) {
      for (int j = 0; j < GROUP; ++j) *reinterpret_cast<Vector*>(sums + (i * GROUP + j) * WIDTH) = part[i][j];
    }
  }
}

inline int64_t place(int64_t i, int64_t j) { return (j * (j + 1) / 2 + i) * PAIRS; }
inline int64_t groups_of(int64_t rows) { return round_up(rows, GROUP) / GROUP; }
inline bool are_many(int64_t rows) { return place(0, groups_of(rows)) > KEPT; }

struct Chunk {
  const std::vector<Row>& rows;
  int64_t begin, end, groups, fresh, pitch;  // fresh: groups with a row that is not known; pitch: from group to group
  double *tile, *lanes, *sums;
};

// sums += the lanes of 4 x 4 pairs
template <int WIDTH>
MTU_FAST_INLINE void add_lanes(double* lanes, double* sums) {
  fold<PAIRS, WIDTH>(lanes);
  for (int64_t q = 0; q < PAIRS; ++q) sums[q] += lanes[q];
}

template <int WIDTH, int HEIGHT>
MTU_FAST_INLINE void add_products(const Chunk& c) {
  const int64_t all = place(0, c.groups);
  std::fill(c.lanes, c.lanes + all * WIDTH, 0.0);
  for (int64_t start = c.begin; start < c.end; start += TILE) {
    const int64_t n = std::min(TILE, c.end - start), steps = round_up(n, LANES) / LANES;
    for (size_t r = 0; r < c.rows.size(); ++r) {
      widen<STEP>(c.rows[r], start, n, c.tile + r / GROUP * c.pitch + r % GROUP * LANES, AHEAD);
    }
    for (int64_t i = 0; i < c.fresh; ++i) {
      const double* a = c.tile + i * c.pitch;
      multiply<WIDTH, HEIGHT, true>(a, a, steps, c.lanes + place(i, i) * WIDTH);
      for (int64_t j = i + 1; j < c.groups; ++j) {
        multiply<WIDTH, HEIGHT, false>(a, c.tile + j * c.pitch, steps, c.lanes + place(i, j) * WIDTH);
      }
    }
  }
  for (int64_t k = 0; k < all; k += PAIRS) add_lanes<WIDTH>(c.lanes + k * WIDTH, c.sums + k);
}

// One binary, three instruction sets, chosen at the first call.
typedef void (*AddProducts)(const Chunk&);

#ifdef MTU_FAST_X86
MTU_FAST_FOR("avx512f,avx512vl,avx512dq,fma") void add_products_avx512(const Chunk& c) { add_products<8, 4>(c); }
MTU_FAST_FOR("avx2,fma") void add_products_avx2(const Chunk& c) { add_products<4, 2>(c); }
void add_products_any(const Chunk& c) { add_products<2, 2>(c); }

AddProducts best() {
  switch (vectors()) {
    case Vectors::Avx512: return add_products_avx512;
    case Vectors::Avx2: return add_products_avx2;
    default: return add_products_any;
  }
}
#else
void add_products_any(const Chunk& c) { add_products<2, 4>(c); }
AddProducts best() { return add_products_any; }
#endif

}  // namespace

RowSums::RowSums(int64_t rows, int64_t known) : rows_(rows), fresh_(rows - known), many_(rows, fresh_) {}

int64_t RowSums::pairs(int64_t rows) { return are_many(rows) ? ManyRows(rows, rows).sums() : place(0, groups_of(rows)); }

int64_t RowSums::size() const { return are_many(rows_) ? many_.sums() : pairs(rows_); }

void RowSums::resize(int64_t slots) {
  slots_ = slots;
  sums_.assign(slots * size(), 0.0);
}

void RowSums::add(int64_t slot, const std::vector<Row>& rows, int64_t begin, int64_t end, Room& room) {
  static const AddProducts add = best();
  double* const sums = sums_.data() + slot * size();
  if (are_many(rows_)) return many_.add(rows, begin, end, room.many, sums);
  const int64_t groups = groups_of(rows_), pitch = std::min(TILE, round_up(end - begin, LANES)) * GROUP;
  const int64_t tile = groups * pitch / LANES;
  if (room.tile != tile) {
    room.lines.reset(new Line[tile + size()]);
    room.tile = tile;
    std::fill(&room.lines[tile - pitch / LANES], &room.lines[tile], Line{});  // what fills up the last group
  }
  add({rows, begin, end, groups, groups_of(fresh_), pitch, room.lines[0].lane, room.lines[tile].lane, sums});
}

void RowSums::write(double* gram) {
  const int64_t R = rows_, all = size();
  if (slots_ == 0) return std::fill(gram, gram + R * R, 0.0);
  for (int64_t s = 1; s < slots_; ++s) {
    for (int64_t k = 0; k < all; ++k) sums_[k] += sums_[s * all + k];
  }
  if (are_many(R)) return many_.write(sums_.data(), gram);
  for (int64_t j = 0; j < R; j += GROUP) {
    for (int64_t i = 0; i <= j; i += GROUP) {
      const double* pairs = sums_.data() + place(i / GROUP, j / GROUP);
      for (int64_t q = 0; q < PAIRS; ++q) {
        const int64_t row = i + q / GROUP, column = j + q % GROUP;
        if (row > column || column >= R) continue;
        gram[row * R + column] = gram[column * R + row] = row < fresh_ ? pairs[q] : 0.0;
      }
    }
  }
}

RowGram::RowGram(std::vector<Row> rows, int64_t columns, int64_t known)
    : rows_(std::move(rows)), columns_(columns), sums_(rows_.size(), known) {
  const int64_t R = rows_.size(), pairs = std::max<int64_t>(1, RowSums::pairs(R));
  const int64_t share = columns / (CHUNK_PER_ROW * std::max<int64_t>(1, R));
  const int64_t most = std::min(CHUNKS, std::max({int64_t{1}, share, SMALL / pairs}));
  width_ = round_up(std::max(std::min(CHUNK, WORK / pairs), columns / most), TILE);
  chunks_ = R == 0 ? 0 : round_up(columns, width_) / width_;
  sums_.resize(chunks_);
}

int64_t RowGram::work() const { return std::min(width_, columns_) * RowSums::pairs(rows_.size()); }

void RowGram::sum(int64_t begin, int64_t end) {
  RowSums::Room room;
  for (int64_t c = begin; c < end; ++c) sums_.add(c, rows_, c * width_, std::min((c + 1) * width_, columns_), room);
}

void add_hadamard(const Factor& left, const Factor& right, int64_t R, int64_t begin, int64_t end, double* gram) {
  for (size_t i = 0; i < left.blocks.size(); ++i) {
    const Factor::Block &l = left.blocks[i], &r = right.blocks[i];
    for (int64_t row = std::max(begin, l.row); row < std::min(end, l.row + l.count); ++row) {
      const double* a = left.gram.data() + (l.at + row - l.row) * left.rows;
      const double* b = right.gram.data() + (r.at + row - l.row) * right.rows;
      for (size_t j = 0; j < left.blocks.size(); ++j) {
        const Factor::Block &m = left.blocks[j], &s = right.blocks[j];
        for (int64_t q = 0; q < m.count; ++q) gram[row * R + m.row + q] += a[m.at + q] * b[s.at + q];
      }
    }
  }
}

}  // namespace mtu_fast::cpu
