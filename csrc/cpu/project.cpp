// A tile of columns of the rows is widened to float64 and used while it lies in the nearest caches:
//
//     sum      four rows Q at a time meet every g:    sums[m][k] += Σ_p g[m][p] Q[k][p]
//     expand   all rows Q at once, four results at a time:    out[m][p] = (g[m][p] -) Σ_k c[m][k] Q[k][p]
//
// The second pass goes through a thread's chunks backwards: what the first read last is still in the cache.

#include "project.h"

#include <algorithm>
#include <utility>

namespace mtu_fast::cpu {
namespace {

constexpr int64_t GROUP = 4;          // rows Q that meet a vector at once
constexpr int64_t BLOCK = 32;         // columns of a tile go by
constexpr int64_t STORE = 1 << 14;    // elements of a tile: 128 KiB
constexpr int64_t LONGEST = 1024;     // most columns of a tile
constexpr int64_t CHUNK = 4096;       // least columns of a chunk
constexpr int64_t CHUNKS = 256;       // most chunks

// A tile: columns start .. start+n-1 of one piece.
struct Sum {
  const Piece& piece;
  int64_t rows, vectors, start, n, pitch;
  double *q, *g, *sums;  // [GROUP, pitch], [M, pitch], [M, K]
};

struct Expand {
  const Piece& piece;
  int64_t rows, vectors, start, n, pitch;
  double *q, *result;  // [K, pitch], [GROUP, pitch]
};

// COUNT vectors with GROUP rows.
template <int WIDTH, int COUNT>
MTU_FAST_INLINE void multiply(const Sum& t, int64_t m, int64_t k) {
  typedef double Vector __attribute__((vector_size(WIDTH * sizeof(double)), may_alias));
  Vector part[COUNT][GROUP] = {};
  for (int64_t p = 0; p < t.n; p += LANES) {
#pragma GCC unroll 8
    for (int64_t l = p; l < p + LANES; l += WIDTH) {
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
        const Vector g = *reinterpret_cast<const Vector*>(t.g + (m + i) * t.pitch + l);
#pragma GCC unroll 8
        for (int j = 0; j < GROUP; ++j) part[i][j] += g * *reinterpret_cast<const Vector*>(t.q + j * t.pitch + l);
      }
    }
  }
  for (int i = 0; i < COUNT; ++i) {
    for (int64_t j = 0; j < std::min(GROUP, t.rows - k); ++j) {
      double sum = 0;
      for (int l = 0; l < WIDTH; ++l) sum += part[i][j][l];
      t.sums[(m + i) * t.rows + k + j] += sum;
    }
  }
}

template <int WIDTH, int HEIGHT>
MTU_FAST_INLINE void sum_tile(const Sum& t) {
  for (int64_t m = 0; m < t.vectors; ++m) {
    widen<LANES>(t.piece.vectors.row(m), t.start, t.n, t.g + m * t.pitch, 2 * t.pitch);
  }
  for (int64_t k = 0; k < t.rows; k += GROUP) {  // the last group may hold an old row, whose sums are left out
    for (int64_t j = 0; j < std::min(GROUP, t.rows - k); ++j) {
      widen<LANES>(t.piece.rows.row(k + j), t.start, t.n, t.q + j * t.pitch, t.pitch);
    }
    int64_t m = 0;
    for (; m + HEIGHT <= t.vectors; m += HEIGHT) multiply<WIDTH, HEIGHT>(t, m, k);
    for (; m < t.vectors; ++m) multiply<WIDTH, 1>(t, m, k);
  }
}

// COUNT rows of weights · Q.
template <int WIDTH, int COUNT, int VECTORS>
MTU_FAST_INLINE void combine(const Expand& t, int64_t m) {
  typedef double Vector __attribute__((vector_size(WIDTH * sizeof(double)), may_alias));
  const double* weights = t.piece.weights + m * t.rows;
  for (int64_t p = 0; p < t.n; p += WIDTH * VECTORS) {
    Vector part[COUNT][VECTORS] = {};
    for (int64_t k = 0; k < t.rows; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const Vector q = *reinterpret_cast<const Vector*>(t.q + k * t.pitch + p + v * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) part[i][v] += weights[i * t.rows + k] * q;
      }
    }
    for (int i = 0; i < COUNT; ++i) {
      for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vector*>(t.result + i * t.pitch + p + v * WIDTH) = part[i][v];
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

template <int WIDTH, int VECTORS>
MTU_FAST_INLINE void expand_tile(const Expand& t) {
  for (int64_t k = 0; k < t.rows; ++k) {
    widen<LANES>(t.piece.rows.row(k), t.start, t.n, t.q + k * t.pitch, t.pitch);
  }
  int64_t m = 0;
  for (; m + GROUP <= t.vectors; m += GROUP) {
    combine<WIDTH, GROUP, VECTORS>(t, m);
    for (int64_t i = 0; i < GROUP; ++i) write(t, m + i, t.result + i * t.pitch);
  }
  for (; m < t.vectors; ++m) {
    combine<WIDTH, 1, VECTORS>(t, m);
    write(t, m, t.result);
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
  tile_ = std::clamp(STORE / std::max<int64_t>(rows + vectors, 1) / BLOCK * BLOCK, 2 * BLOCK, LONGEST);
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
  std::vector<Line> store((GROUP + vectors_) * tile_ / LANES);
  double *q = store.data()->lane, *g = q + GROUP * tile_;
  for (int64_t c = begin; c < end; ++c) {
    double* sums = sums_.data() + c * vectors_ * rows_;
    walk(c, [&](const Piece& piece, int64_t start, int64_t n) {
      kernels().sum({piece, rows_, vectors_, start, n, tile_, q, g, sums});
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
