// Micro-kernels of the ghost Grams, for each instruction set.

#include "products.h"

#include <algorithm>
#include <cstring>

namespace mtu_fast::cpu {
namespace {

constexpr int64_t AHEAD = 2 * DEPTH;  // columns between those that are turned and those that are fetched

template <class T>
MTU_FAST_INLINE void widen(const T* from, const int64_t* offset, int64_t step, int64_t channels, double* to) {
  bool near = true;  // neighbours in memory: a channel of the panel is read at once
  for (int64_t l = 0; l < LANES; ++l) near &= offset[l] == offset[0] + l;
  if (near) {
    from += offset[0];
    for (int64_t k = 0; k < channels; ++k, from += step, to += LANES) {
      for (int64_t l = 0; l < LANES; ++l) to[l] = wide(from[l]);
    }
    return;
  }
  for (int64_t begin = 0; begin < channels; begin += LANES) {
    const int64_t end = std::min(begin + LANES, channels);
    for (int64_t l = 0; l < LANES; ++l) {
      const T* own = from + std::max<int64_t>(offset[l], 0);
      if (offset[l] < 0) {  // a lane without a position
        for (int64_t k = begin; k < end; ++k) to[k * LANES + l] = 0;
      } else if (step == 1) {
        for (int64_t k = begin; k < end; ++k) to[k * LANES + l] = wide(own[k]);
      } else {
        for (int64_t k = begin; k < end; ++k) to[k * LANES + l] = wide(own[k * step]);
      }
    }
  }
}

MTU_FAST_INLINE void widen(const Panels& side, int64_t panel) {
  const int64_t *offset = side.offset.data() + panel * LANES, step = side.block->stride[2];
  for (int64_t begin = 0; begin < side.channels; begin += DEPTH) {
    const int64_t skip = begin * step, depth = std::min(DEPTH, side.channels - begin);
    double* to = side.at(begin, panel);
    const void* data = side.block->data;
    switch (side.block->element) {
      case Element::Double: widen(static_cast<const double*>(data) + skip, offset, step, depth, to); break;
      case Element::Float: widen(static_cast<const float*>(data) + skip, offset, step, depth, to); break;
      case Element::BFloat16: widen(static_cast<const BFloat16*>(data) + skip, offset, step, depth, to); break;
      case Element::Half: widen(static_cast<const Half*>(data) + skip, offset, step, depth, to); break;
    }
  }
}

template <int WIDTH>
struct Simd {
  typedef double Vector __attribute__((vector_size(WIDTH * sizeof(double)), may_alias, aligned(8)));
};

// to[column][row], of eight rows or fewer, filled up with zeros: rows and columns to a multiple of eight.
template <int WIDTH>
MTU_FAST_INLINE void turn(const Row* rows, int64_t count, int64_t start, int64_t columns, double* to) {
  typedef typename Simd<WIDTH>::Vector Vector;
  double square[LANES][LANES] = {};
  for (int64_t k = 0; k < columns; k += LANES) {
    for (int64_t l = 0; l < count; ++l) {
      widen<LANES>(rows[l], start + k, std::min(LANES, columns - k), square[l], AHEAD);
    }
    for (int64_t c = 0; c < LANES; ++c, to += LANES) {
      for (int64_t first = 0; first < LANES; first += WIDTH) {
        Vector column;
#pragma GCC unroll 8
        for (int l = 0; l < WIDTH; ++l) column[l] = square[first + l][c];
        *reinterpret_cast<Vector*>(to + first) = column;
      }
    }
  }
}

// out[s][p] (+)= Σ_k left[p][k] right[s][k] for COUNT panels of p and one of s, COLUMNS of it at a time.
template <int WIDTH, int COUNT, int COLUMNS>
MTU_FAST_INLINE void block(const double* left, int64_t pitch, const double* right, int64_t depth, bool more,
                           double* out, int64_t ld) {
  typedef typename Simd<WIDTH>::Vector Vector;
  constexpr int HEIGHT = COUNT * LANES / WIDTH;
  for (int64_t start = 0; start < LANES; start += COLUMNS) {
    Vector part[COLUMNS][HEIGHT] = {};
    if (more) {
      for (int c = 0; c < COLUMNS; ++c) {
        for (int h = 0; h < HEIGHT; ++h) part[c][h] = *reinterpret_cast<Vector*>(out + (start + c) * ld + h * WIDTH);
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
      Vector column[HEIGHT];
#pragma GCC unroll 16
      for (int h = 0; h < HEIGHT; ++h) {
        constexpr int EACH = LANES / WIDTH;
        column[h] = *reinterpret_cast<const Vector*>(left + h / EACH * pitch + k * LANES + h % EACH * WIDTH);
      }
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; ++c) {
        const double scale = right[k * LANES + start + c];
#pragma GCC unroll 16
        for (int h = 0; h < HEIGHT; ++h) part[c][h] += column[h] * scale;
      }
    }
    for (int c = 0; c < COLUMNS; ++c) {
      for (int h = 0; h < HEIGHT; ++h) *reinterpret_cast<Vector*>(out + (start + c) * ld + h * WIDTH) = part[c][h];
    }
  }
}

// out[s][p] = left_p · right_s; on the diagonal only panels of p up to that of s.
template <int WIDTH, int COUNT, int COLUMNS>
MTU_FAST_INLINE void multiply(const Matrix& left, const Matrix& right, bool diagonal, double* out, int64_t ld) {
  const int64_t channels = left.side.channels;
  int64_t begin = 0;
  do {
    const int64_t depth = std::min(DEPTH, channels - begin), pitch = depth * LANES;
    const double* a = left.side.at(begin, left.first);
    const double* b = right.side.at(begin, right.first);
    const bool more = begin > 0;
    for (int64_t s = 0; s < right.count; ++s, b += pitch) {
      const int64_t last = diagonal ? s + 1 : left.count;
      double* to = out + s * LANES * ld;
      int64_t p = 0;
      for (; p + COUNT <= last; p += COUNT) {
        block<WIDTH, COUNT, COLUMNS>(a + p * pitch, pitch, b, depth, more, to + p * LANES, ld);
      }
      if (COUNT > 2 && p + 2 <= last) {
        block<WIDTH, 2, COLUMNS>(a + p * pitch, pitch, b, depth, more, to + p * LANES, ld);
        p += 2;
      }
      for (; p < last; ++p) block<WIDTH, 1, COLUMNS>(a + p * pitch, pitch, b, depth, more, to + p * LANES, ld);
    }
    begin += depth;
  } while (begin < channels);
}

// to[l] = Σ_t from[t][l]
template <int WIDTH>
MTU_FAST_INLINE void add(const double* const* from, int64_t count, int64_t length, double* to) {
  typedef typename Simd<WIDTH>::Vector Vector;
  for (int64_t l = 0; l < length; l += 2 * WIDTH) {
    Vector low = {}, high = {};
    for (int64_t t = 0; t < count; ++t) {
      low += *reinterpret_cast<const Vector*>(from[t] + l);
      high += *reinterpret_cast<const Vector*>(from[t] + l + WIDTH);
    }
    *reinterpret_cast<Vector*>(to + l) = low;
    *reinterpret_cast<Vector*>(to + l + WIDTH) = high;
  }
}

// sums[row of p][row of s] += x[s][p] b[s][p]
template <int WIDTH>
MTU_FAST_INLINE void sum(const double* x, const double* b, int64_t ld, const PositionRows& rows, bool diagonal,
                         double* sums) {
  typedef typename Simd<WIDTH>::Vector Vector;
  const int64_t height = rows.left.size(), width = rows.right.size();
  for (int64_t begin = 0, end; begin < width; begin = end) {
    const int64_t q = rows.right[begin];
    for (end = begin + 1; end < width && rows.right[end] == q;) ++end;
    for (int64_t p = 0; p < height && !(diagonal && p >= end); p += LANES) {
      constexpr int EACH = LANES / WIDTH;
      Vector part[EACH] = {};
      for (int64_t s = diagonal ? std::max(begin, p) : begin; s < end; ++s) {
        for (int h = 0; h < EACH; ++h) {
          const int64_t at = s * ld + p + h * WIDTH;
          part[h] += *reinterpret_cast<const Vector*>(x + at) * *reinterpret_cast<const Vector*>(b + at);
        }
      }
      double lanes[LANES];
      std::memcpy(lanes, part, sizeof lanes);
      for (int64_t l = 0; l < std::min(LANES, height - p); ++l) sums[rows.left[p + l] * rows.width + q] += lanes[l];
    }
  }
}

#ifndef MTU_FAST_FOR
#define MTU_FAST_FOR(features)
#endif
#define MTU_FAST_PRODUCTS(NAME, FEATURES, WIDTH, COUNT, COLUMNS)                                                       \
  MTU_FAST_FOR(FEATURES)                                                                                               \
  void turn_##NAME(const Row* rows, int64_t count, int64_t start, int64_t columns, double* to) {                       \
    turn<WIDTH>(rows, count, start, columns, to);                                                                      \
  }                                                                                                                    \
  MTU_FAST_FOR(FEATURES) void widen_##NAME(const Panels& side, int64_t panel) { widen(side, panel); }                  \
  MTU_FAST_FOR(FEATURES)                                                                                               \
  void multiply_##NAME(const Matrix& left, const Matrix& right, bool diagonal, double* out, int64_t ld) {              \
    multiply<WIDTH, COUNT, COLUMNS>(left, right, diagonal, out, ld);                                                   \
  }                                                                                                                    \
  MTU_FAST_FOR(FEATURES) void add_##NAME(const double* const* from, int64_t count, int64_t length, double* to) {       \
    add<WIDTH>(from, count, length, to);                                                                               \
  }                                                                                                                    \
  MTU_FAST_FOR(FEATURES)                                                                                               \
  void sum_##NAME(const double* x, const double* b, int64_t ld, const PositionRows& rows, bool diagonal,               \
                  double* sums) {                                                                                      \
    sum<WIDTH>(x, b, ld, rows, diagonal, sums);                                                                        \
  }                                                                                                                    \
  constexpr Products NAME = {turn_##NAME, widen_##NAME, multiply_##NAME, add_##NAME, sum_##NAME};

#ifdef MTU_FAST_X86
MTU_FAST_PRODUCTS(avx512, "avx512f,avx512vl,avx512dq,fma", 8, 3, 8)
MTU_FAST_PRODUCTS(avx2, "avx2,fma", 4, 1, 4)
MTU_FAST_PRODUCTS(any, "sse2", 2, 1, 2)

Products best() {
  switch (vectors()) {
    case Vectors::Avx512: return avx512;
    case Vectors::Avx2: return avx2;
    default: return any;
  }
}
#else
MTU_FAST_PRODUCTS(any, "", 2, 1, 4)
Products best() { return any; }
#endif

}  // namespace

const Products& products() {
  static const Products chosen = best();
  return chosen;
}

}  // namespace mtu_fast::cpu
