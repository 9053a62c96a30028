// The wide side is packed once, by panels of 128 bytes: [panel][position][column]; the tall one by panels of twelve
// columns when they are multiplied. A micro-kernel sums 12 columns by 128 bytes over positions in registers. A tile is
// such blocks of all rows, as many as the second nearest cache holds where rows are few.

#include "direct.h"

#include <algorithm>
#include <utility>

namespace mtu_fast::cpu {
namespace {

constexpr int64_t HEIGHT = 12;     // columns of a tall panel
constexpr int64_t WIDE = 128;      // bytes of a wide one
constexpr int64_t SUMMED = 192;    // positions summed at once: a wide panel is 24 KiB
constexpr int64_t TILE = 1 << 18;  // bytes,
constexpr int64_t LEAST = 8;       // or so many blocks of every row, if they are more: panels are read less often
constexpr int64_t TURNS = 32;      // tiles there should be along the tall side, for the threads
constexpr int64_t SLOTS = 32;      // most,
constexpr int64_t SUMS = 1 << 26;  // in so many bytes,
constexpr int64_t FEW = 2;         // or so few

template <class T>
constexpr int64_t WIDTH = WIDE / sizeof(T);
template <class T>
constexpr int64_t BLOCK = HEIGHT * WIDTH<T>;

int64_t divide_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

template <class T>
T* numbers(const std::unique_ptr<Line[]>& lines) {
  return reinterpret_cast<T*>(lines.get());
}

template <class T>
std::unique_ptr<Line[]> room(int64_t count) {  // not filled
  return std::unique_ptr<Line[]>(new Line[divide_up(count * sizeof(T), sizeof(Line))]);
}

// out[h][l] (+)= Σ_s tall[s][h] wide[s][l], ROWS by two vectors of BYTES at a time, as registers allow.
template <class T, int BYTES, int ROWS>
MTU_FAST_INLINE void block(const T* tall, const T* wide, int64_t positions, bool more, T* out) {
  typedef T Vector __attribute__((vector_size(BYTES), may_alias, aligned(8)));
  constexpr int64_t EACH = BYTES / sizeof(T);
  for (int64_t left = 0; left < WIDTH<T>; left += 2 * EACH) {
    for (int64_t top = 0; top < HEIGHT; top += ROWS) {
      Vector part[ROWS][2] = {};
      for (int64_t s = 0; s < positions; ++s) {
        const Vector low = *reinterpret_cast<const Vector*>(wide + s * WIDTH<T> + left);
        const Vector high = *reinterpret_cast<const Vector*>(wide + s * WIDTH<T> + left + EACH);
#pragma GCC unroll 16
        for (int h = 0; h < ROWS; ++h) {
          const T scale = tall[s * HEIGHT + top + h];
          part[h][0] += low * scale;
          part[h][1] += high * scale;
        }
      }
      for (int h = 0; h < ROWS; ++h) {
        Vector* to = reinterpret_cast<Vector*>(out + (top + h) * WIDTH<T> + left);
        to[0] = more ? to[0] + part[h][0] : part[h][0];
        to[1] = more ? to[1] + part[h][1] : part[h][1];
      }
    }
  }
}

template <class T>
using Form = void (*)(const T* tall, const T* wide, int64_t positions, bool more, T* out);

#ifdef MTU_FAST_X86
template <class T>
MTU_FAST_FOR("avx512f,avx512vl,avx512dq,fma")
void block_avx512(const T* tall, const T* wide, int64_t positions, bool more, T* out) {
  block<T, 64, 12>(tall, wide, positions, more, out);
}
template <class T>
MTU_FAST_FOR("avx2,fma")
void block_avx2(const T* tall, const T* wide, int64_t positions, bool more, T* out) {
  block<T, 32, 6>(tall, wide, positions, more, out);
}
template <class T>
void block_any(const T* tall, const T* wide, int64_t positions, bool more, T* out) {
  block<T, 16, 6>(tall, wide, positions, more, out);
}

template <class T>
Form<T> best() {
  switch (vectors()) {
    case Vectors::Avx512: return block_avx512<T>;
    case Vectors::Avx2: return block_avx2<T>;
    default: return block_any<T>;
  }
}
#else
template <class T>
void block_any(const T* tall, const T* wide, int64_t positions, bool more, T* out) {
  block<T, 16, 12>(tall, wide, positions, more, out);
}

template <class T>
Form<T> best() {
  return block_any<T>;
}
#endif

}  // namespace

Direct::Direct(const std::vector<Block>& x, const std::vector<Block>& b, const std::vector<Pair>& pairs, const Walk& walk,
               const std::vector<int64_t>& into) {
  std::vector<int64_t> grids(x.size());
  for (const Pair& pair : pairs) grids[pair.x] = pair.b;
  Sides both = sides(x, b, grids, walk);
  tall_ = std::move(both.x), wide_ = std::move(both.b);
  is_double_ = is_double(tall_) || is_double(wide_);

  const auto first_row = [](const std::vector<Block>& blocks, int64_t block) {
    int64_t row = 0;
    for (int64_t n = 0; n < block; ++n) row += blocks[n].size[0];
    return row;
  };
  const bool turned = tall_.columns < wide_.columns && tall_.taps[0].size() == 1;  // patches are never packed whole
  if (turned) std::swap(tall_, wide_);
  uses_.resize(tall_.rows.size());
  int64_t given = 0;
  for (const Pair& pair : pairs) {
    const int64_t of_x = first_row(x, pair.x), of_b = first_row(b, pair.b);
    for (int64_t r = 0; r < x[pair.x].size[0]; ++r, ++given) {
      const int64_t row = into.empty() ? given : into[given];
      if (row < 0) continue;
      rows_ = std::max(rows_, row + 1);
      positions_ += (turned ? wide_ : tall_).rows[r + of_x].positions;
      uses_[r + (turned ? of_b : of_x)].push_back({row, r + (turned ? of_x : of_b)});
    }
  }
  std::vector<bool> formed(rows_, false);
  for (std::vector<Use>& of_row : uses_) {  // in the order in which tiles are formed
    for (Use& use : of_row) {
      use.adds = formed[use.row];
      formed[use.row] = true;
    }
  }
  is_double_ ? plan<double>() : plan<float>();
}

template <class T>
void Direct::plan() {
  sums_ = RowSums(rows_, 0);
  tall_panels_ = divide_up(tall_.columns, HEIGHT);
  wide_panels_ = divide_up(wide_.columns, WIDTH<T>);
  if (rows_ == 0 || tall_panels_ == 0 || wide_panels_ == 0) return;
  const int64_t blocks = std::max<int64_t>(LEAST, TILE / (rows_ * HEIGHT * WIDE));  // of a tile
  across_ = divide_up(wide_panels_, divide_up(wide_panels_, blocks));
  down_ = std::max<int64_t>(1, std::min(blocks / across_, tall_panels_ / TURNS));
  const int64_t most = SUMS / (RowSums::pairs(rows_) * static_cast<int64_t>(sizeof(double)));
  slots_ = std::min(divide_up(tall_panels_, down_), std::max(FEW, std::min(SLOTS, most)));
  sums_.resize(slots_);
  packed_ = room<T>(wide_.positions * wide_panels_ * WIDTH<T>);
}

int64_t Direct::width() const { return wide_.columns * wide_.positions / std::max<int64_t>(1, wide_rows()); }

int64_t Direct::work() const {
  return (positions_ + RowSums::pairs(rows_)) * tall_.columns * wide_.columns / std::max<int64_t>(1, slots_);
}

void Direct::pack(int64_t begin, int64_t end) { is_double_ ? pack_as<double>(begin, end) : pack_as<float>(begin, end); }

template <class T>
void Direct::pack_as(int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const Side::Row& row = wide_.rows[r];
    T* to = numbers<T>(packed_) + row.first * wide_panels_ * WIDTH<T>;
    for (int64_t panel = 0; panel < wide_panels_; ++panel, to += row.positions * WIDTH<T>) {
      lay_out<WIDTH<T>>(wide_, row, panel * WIDTH<T>, 0, row.positions, to);
    }
  }
}

void Direct::sum(int64_t begin, int64_t end) { is_double_ ? sum_as<double>(begin, end) : sum_as<float>(begin, end); }

template <class T>
void Direct::sum_as(int64_t begin, int64_t end) {
  const int64_t turns = divide_up(tall_panels_, down_);
  const auto panels = room<T>(down_ * HEIGHT * SUMMED), tile = room<T>(rows_ * down_ * across_ * BLOCK<T>);
  RowSums::Room room_for_sums;
  std::vector<Row> rows(rows_, {nullptr, is_double_ ? Element::Double : Element::Float});
  for (int64_t slot = begin; slot < end; ++slot) {
    for (int64_t turn = slot * turns / slots_; turn < (slot + 1) * turns / slots_; ++turn) {
      const int64_t top = turn * down_, down = std::min(down_, tall_panels_ - top);
      for (int64_t left = 0; left < wide_panels_; left += across_) {
        const int64_t across = std::min(across_, wide_panels_ - left), columns = down * across * BLOCK<T>;
        T* formed = numbers<T>(tile);
        form_tile(top, down, left, across, numbers<T>(panels), formed);
        for (int64_t r = 0; r < rows_; ++r) rows[r].data = formed + r * columns;
        sums_.add(slot, rows, 0, columns, room_for_sums);
      }
    }
  }
}

// tile: [row][wide panel][tall panel][12][128 bytes]
template <class T>
void Direct::form_tile(int64_t top, int64_t down, int64_t left, int64_t across, T* panels, T* tile) const {
  static const Form<T> form = best<T>();
  const T* packed = numbers<T>(packed_);
  for (size_t t = 0; t < uses_.size(); ++t) {
    const int64_t positions = tall_.rows[t].positions;
    int64_t start = 0;
    do {
      const int64_t depth = std::min(SUMMED, positions - start);
      for (int64_t i = 0; i < down; ++i) {
        T* to = panels + i * depth * HEIGHT;
        lay_out<HEIGHT>(tall_, tall_.rows[t], (top + i) * HEIGHT, start, depth, to);
      }
      for (const Use& use : uses_[t]) {
        const T* b = packed + (wide_.rows[use.wide].first * wide_panels_ + left * positions + start) * WIDTH<T>;
        T* out = tile + use.row * down * across * BLOCK<T>;
        const bool more = use.adds || start > 0;
        for (int64_t j = 0; j < across; ++j, b += positions * WIDTH<T>) {
          for (int64_t i = 0; i < down; ++i, out += BLOCK<T>) form(panels + i * depth * HEIGHT, b, depth, more, out);
        }
      }
      start += depth;
    } while (start < positions);
  }
}

}  // namespace mtu_fast::cpu
