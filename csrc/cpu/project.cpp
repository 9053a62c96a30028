// Rows are converted in registers as they are read; a tile of columns of what is read again is widened to float64 first:
//
//     sum      four rows Q at a time meet every g, which are widened:     sums[m][k] += Σ_p g[m][p] Q[k][p]
//     expand   four results at a time, Q widened if there are more:       out[m][p] = (g[m][p] -) Σ_k c[m][k] Q[k][p]
//
// The second pass goes through a thread's chunks backwards: what the first read last is still in the cache.

#include "project.h"

#include <algorithm>
#include <utility>

namespace mtu_fast::cpu {
namespace {

constexpr int64_t GROUP = 4;        // rows that are read, or written, at once
constexpr int64_t FEW = 2;          // results for which rows are read in place
constexpr int64_t BLOCK = 64;       // a tile is a multiple of it
constexpr int64_t STORE = 1 << 16;  // elements of a tile: 512 KiB
constexpr int64_t LONGEST = 4096;   // most columns of a tile
constexpr int64_t AHEAD = 2048;     // bytes between what is used and what is fetched
constexpr int64_t CHUNK = 4096;     // least columns of a chunk
constexpr int64_t CHUNKS = 256;     // most chunks

// A tile: columns start .. start+n-1 of one piece.
struct Sum {
  const Piece& piece;
  int64_t rows, vectors, start, n, pitch;
  double *g, *tail, *sums;  // [M, pitch], [GROUP, LANES], [M, K]
};

struct Expand {
  const Piece& piece;
  int64_t rows, vectors, start, n, pitch;
  double *q, *result;  // [K, pitch], [GROUP, pitch]
};

template <class T, int WIDTH>
struct Simd {
  typedef T type __attribute__((vector_size(WIDTH * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <int WIDTH, class T>
MTU_FAST_INLINE void load(const T* p, typename Simd<double, WIDTH>::type& to) {
  if constexpr (sizeof(T) == 2) {
    double lanes[WIDTH];
    for (int l = 0; l < WIDTH; ++l) lanes[l] = wide(p[l]);
    std::memcpy(&to, lanes, sizeof to);
  } else {
    using Wide = typename Simd<double, WIDTH>::type;
    to = __builtin_convertvector(*reinterpret_cast<const typename Simd<T, WIDTH>::type*>(p), Wide);
  }
}

// COUNT vectors with GROUP rows, n columns, a multiple of LANES.
template <int WIDTH, int COUNT, class T>
MTU_FAST_INLINE void multiply(const double* g, int64_t pitch, const T* const* q, int64_t n, double (&sums)[COUNT][GROUP]) {
  using Vector = typename Simd<double, WIDTH>::type;
  Vector part[COUNT][GROUP] = {};
  const T *a = q[0], *b = q[1], *c = q[2], *d = q[3];
  for (int64_t p = 0; p < n; p += LANES) {
    for (const T* row : {a, b, c, d}) __builtin_prefetch(reinterpret_cast<const char*>(row + p) + AHEAD);
#pragma GCC unroll 8
    for (int64_t l = p; l < p + LANES; l += WIDTH) {
      Vector rows[GROUP] = {}, vector = {};
      load<WIDTH>(a + l, rows[0]);
      load<WIDTH>(b + l, rows[1]);
      load<WIDTH>(c + l, rows[2]);
      load<WIDTH>(d + l, rows[3]);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
        load<WIDTH>(g + i * pitch + l, vector);
#pragma GCC unroll 8
        for (int j = 0; j < GROUP; ++j) part[i][j] += vector * rows[j];
      }
    }
  }
  for (int i = 0; i < COUNT; ++i) {
    for (int j = 0; j < GROUP; ++j) {
      for (int l = 0; l < WIDTH; ++l) sums[i][j] += part[i][j][l];
    }
  }
}

template <int WIDTH, int COUNT, class T>
MTU_FAST_INLINE void multiply(const Sum& t, int64_t m, int64_t k) {
  const int64_t count = std::min(GROUP, t.rows - k), whole = t.n / LANES * LANES;
  const T* rows[GROUP];
  const double* tails[GROUP];
  for (int64_t j = 0; j < GROUP; ++j) {  // what fills up the last group is left out below
    rows[j] = static_cast<const T*>(t.piece.rows.row(k + std::min(j, count - 1)).data) + t.start;
    tails[j] = t.tail + j * LANES;
  }
  double sums[COUNT][GROUP] = {};
  multiply<WIDTH, COUNT>(t.g + m * t.pitch, t.pitch, rows, whole, sums);
  if (whole < t.n) {
    for (int64_t j = 0; j < GROUP; ++j) widen<LANES>(rows[j] + whole, t.n - whole, t.tail + j * LANES, 0);
    multiply<WIDTH, COUNT>(t.g + m * t.pitch + whole, t.pitch, tails, LANES, sums);
  }
  for (int i = 0; i < COUNT; ++i) {
    for (int64_t j = 0; j < count; ++j) t.sums[(m + i) * t.rows + k + j] += sums[i][j];
  }
}

template <int WIDTH, int HEIGHT, class T>
MTU_FAST_INLINE void sum_tile(const Sum& t) {
  for (int64_t k = 0; k < t.rows; k += GROUP) {
    int64_t m = 0;
    for (; m + HEIGHT <= t.vectors; m += HEIGHT) multiply<WIDTH, HEIGHT, T>(t, m, k);
    for (; m < t.vectors; ++m) multiply<WIDTH, 1, T>(t, m, k);
  }
}

template <int WIDTH, int HEIGHT>
MTU_FAST_INLINE void sum_tile(const Sum& t) {
  for (int64_t m = 0; m < t.vectors; ++m) {
    widen<LANES>(t.piece.vectors.row(m), t.start, t.n, t.g + m * t.pitch, AHEAD);
  }
  switch (t.piece.rows.element) {
    case Element::Double: return sum_tile<WIDTH, HEIGHT, double>(t);
    case Element::Float: return sum_tile<WIDTH, HEIGHT, float>(t);
    case Element::BFloat16: return sum_tile<WIDTH, HEIGHT, BFloat16>(t);
    case Element::Half: return sum_tile<WIDTH, HEIGHT, Half>(t);
  }
}

// result[m] += Σ_j weights[m][k + j] Q[k + j] for COUNT rows from k on and every m, over the first n columns.
template <int WIDTH, int COUNT, class T>
MTU_FAST_INLINE void accumulate(const Expand& t, int64_t k, int64_t n) {
  using Vector = typename Simd<double, WIDTH>::type;
  const T* q[COUNT];
  for (int j = 0; j < COUNT; ++j) q[j] = static_cast<const T*>(t.piece.rows.row(k + j).data) + t.start;
  for (int64_t m = 0; m < t.vectors; ++m) {
    const double* weights = t.piece.weights + m * t.rows + k;
    double* result = t.result + m * t.pitch;
    for (int64_t p = 0; p < n; p += LANES) {
      if (m == 0) {
        for (int j = 0; j < COUNT; ++j) __builtin_prefetch(reinterpret_cast<const char*>(q[j] + p) + AHEAD);
      }
#pragma GCC unroll 8
      for (int64_t l = p; l < p + LANES; l += WIDTH) {
        Vector value = {}, part = {};
        if (k > 0) load<WIDTH>(result + l, part);
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; ++j) {
          load<WIDTH>(q[j] + l, value);
          part += weights[j] * value;
        }
        *reinterpret_cast<Vector*>(result + l) = part;
      }
    }
  }
}

// COUNT rows of weights · Q from column begin on, Q widened.
template <int WIDTH, int COUNT, int VECTORS>
MTU_FAST_INLINE void combine(const Expand& t, int64_t m, int64_t begin, double* result) {
  using Vector = typename Simd<double, WIDTH>::type;
  const double* weights = t.piece.weights + m * t.rows;
  for (int64_t p = begin; p < t.n; p += WIDTH * VECTORS) {
    Vector part[COUNT][VECTORS] = {};
    const double* row = t.q + p;
    for (int64_t k = 0; k < t.rows; ++k, row += t.pitch) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        Vector value = {};
        load<WIDTH>(row + v * WIDTH, value);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) part[i][v] += weights[i * t.rows + k] * value;
      }
    }
    for (int i = 0; i < COUNT; ++i) {
      for (int v = 0; v < VECTORS; ++v) {
        *reinterpret_cast<Vector*>(result + i * t.pitch + p + v * WIDTH) = part[i][v];
      }
    }
  }
}

template <class T>
MTU_FAST_INLINE void write(const T* from, const double* inside, int64_t n, T* to) {
  if (from) {
    for (int64_t p = 0; p < n; ++p) narrow(wide(from[p]) - inside[p], to[p]);
  } else {
    for (int64_t p = 0; p < n; ++p) narrow(inside[p], to[p]);
  }
}

template <class T>
MTU_FAST_INLINE void write(const Expand& t, int64_t m, const double* inside) {
  const Rows& g = t.piece.vectors;
  const T* from = g.data ? static_cast<const T*>(g.row(m).data) + t.start : nullptr;
  write(from, inside, t.n, reinterpret_cast<T*>(t.piece.out.data + m * t.piece.out.step) + t.start);
}

MTU_FAST_INLINE void write(const Expand& t, int64_t m, const double* inside) {
  switch (t.piece.out.element) {
    case Element::Double: return write<double>(t, m, inside);
    case Element::Float: return write<float>(t, m, inside);
    case Element::BFloat16: return write<BFloat16>(t, m, inside);
    case Element::Half: return write<Half>(t, m, inside);
  }
}

template <int WIDTH, int VECTORS, class T>
MTU_FAST_INLINE void expand_tile(const Expand& t) {
  // Few results are gathered in the cache from rows read in place, up to the last block; for many, rows are widened once.
  const int64_t whole = t.vectors <= FEW && t.rows > 0 ? t.n / BLOCK * BLOCK : 0;
  int64_t k = 0;
  for (; k + GROUP <= t.rows && whole > 0; k += GROUP) accumulate<WIDTH, GROUP, T>(t, k, whole);
  for (; k < t.rows && whole > 0; ++k) accumulate<WIDTH, 1, T>(t, k, whole);
  for (k = 0; k < t.rows && whole < t.n; ++k) {
    widen<LANES>(t.piece.rows.row(k), t.start + whole, t.n - whole, t.q + k * t.pitch + whole, t.pitch);
  }
  int64_t m = 0;
  for (; m + GROUP <= t.vectors; m += GROUP) {
    combine<WIDTH, GROUP, VECTORS>(t, m, whole, t.result);
    for (int64_t i = 0; i < GROUP; ++i) write(t, m + i, t.result + i * t.pitch);
  }
  for (; m < t.vectors; ++m) {
    double* result = whole > 0 ? t.result + m * t.pitch : t.result;
    combine<WIDTH, 1, VECTORS>(t, m, whole, result);
    write(t, m, result);
  }
}

template <int WIDTH, int VECTORS>
MTU_FAST_INLINE void expand_tile(const Expand& t) {
  switch (t.piece.rows.element) {
    case Element::Double: return expand_tile<WIDTH, VECTORS, double>(t);
    case Element::Float: return expand_tile<WIDTH, VECTORS, float>(t);
    case Element::BFloat16: return expand_tile<WIDTH, VECTORS, BFloat16>(t);
    case Element::Half: return expand_tile<WIDTH, VECTORS, Half>(t);
  }
}

// One binary, three instruction sets, chosen at the first call.
struct Kernels {
  void (*sum)(const Sum&);
  void (*expand)(const Expand&);
};

#ifdef MTU_FAST_X86
MTU_FAST_FOR("avx512f,avx512vl,avx512dq,fma") void sum_avx512(const Sum& t) { sum_tile<8, 4>(t); }
MTU_FAST_FOR("avx512f,avx512vl,avx512dq,fma") void expand_avx512(const Expand& t) { expand_tile<8, 4>(t); }
MTU_FAST_FOR("avx2,fma") void sum_avx2(const Sum& t) { sum_tile<4, 2>(t); }
MTU_FAST_FOR("avx2,fma") void expand_avx2(const Expand& t) { expand_tile<4, 2>(t); }
void sum_any(const Sum& t) { sum_tile<2, 2>(t); }
void expand_any(const Expand& t) { expand_tile<2, 2>(t); }

Kernels best() {
  switch (vectors()) {
    case Vectors::Avx512: return {sum_avx512, expand_avx512};
    case Vectors::Avx2: return {sum_avx2, expand_avx2};
    default: return {sum_any, expand_any};
  }
}
#else
void sum_any(const Sum& t) { sum_tile<2, 4>(t); }
void expand_any(const Expand& t) { expand_tile<2, 4>(t); }
Kernels best() { return {sum_any, expand_any}; }
#endif

const Kernels& kernels() {
  static const Kernels chosen = best();
  return chosen;
}

}  // namespace

Projection::Projection(std::vector<Piece> pieces, int64_t rows, int64_t vectors)
    : pieces_(std::move(pieces)), rows_(rows), vectors_(vectors) {
  int64_t columns = 0;
  for (const Piece& piece : pieces_) {
    starts_.push_back(columns);
    columns += piece.columns;
  }
  tile_ = std::clamp(STORE / std::max<int64_t>(rows + vectors, 1) / BLOCK * BLOCK, BLOCK, LONGEST);
  width_ = round_up(std::max(CHUNK, columns / CHUNKS), tile_);
  chunks_ = round_up(columns, width_) / width_;
  if (!pieces_.empty() && !pieces_.front().weights) sums_.resize(std::max<int64_t>(chunks_, 1) * vectors_ * rows_);
}

int64_t Projection::work() const { return width_ * std::max<int64_t>(rows_ * vectors_, 1); }

template <class Visit>
void Projection::walk(int64_t chunk, Visit visit) const {
  const int64_t begin = chunk * width_, end = begin + width_;
  auto first = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
  for (size_t i = first; i < pieces_.size() && starts_[i] < end; ++i) {
    const int64_t last = std::min(pieces_[i].columns, end - starts_[i]);
    for (int64_t p = std::max<int64_t>(begin - starts_[i], 0); p < last; p += tile_) {
      visit(pieces_[i], p, std::min(tile_, last - p));
    }
  }
}

void Projection::sum(int64_t begin, int64_t end) {
  std::vector<Line> store(GROUP + vectors_ * tile_ / LANES);
  double *tail = store.data()->lane, *g = tail + GROUP * LANES;
  for (int64_t c = begin; c < end; ++c) {
    double* sums = sums_.data() + c * vectors_ * rows_;
    walk(c, [&](const Piece& piece, int64_t start, int64_t n) {
      kernels().sum({piece, rows_, vectors_, start, n, tile_, g, tail, sums});
    });
  }
}

void Projection::weigh(bool into) {
  const int64_t all = vectors_ * rows_;
  for (int64_t c = 1; c < chunks_; ++c) {
    for (int64_t k = 0; k < all; ++k) sums_[k] += sums_[c * all + k];
  }
  for (Piece& piece : pieces_) {
    piece.weights = sums_.data();
    if (into) piece.vectors.data = nullptr;
  }
}

void Projection::expand(int64_t begin, int64_t end) {
  std::vector<Line> store((GROUP + rows_) * tile_ / LANES);
  double *result = store.data()->lane, *q = result + GROUP * tile_;
  for (int64_t c = end - 1; c >= begin; --c) {
    walk(c, [&](const Piece& piece, int64_t start, int64_t n) {
      kernels().expand({piece, rows_, vectors_, start, n, tile_, q, result});
    });
  }
}

}  // namespace mtu_fast::cpu
