// Left-looking: a column of L is made only when its row becomes a pivot, from one row of G and the columns before it, so
// G is read in place, once for each independent row, and never written. Rows are kept in pivot order, L by columns:
//
//     order[k]   the row of G that is k-th            scale[k]   1 / its length
//     left[k]    what remains of its squared length   y[k]       rhs, then z of L z = rhs, then y of Lᵀ y = z
//     L[m][k]    entry of column m at that row, for k > m; L[m][m] holds the inverse of the pivot's root
//
// All loops over k are contiguous; R³/6 multiply-adds, R(R + 4) words of workspace a thread.

#include "gram_schmidt.h"

#include <cmath>
#include <utility>
#include <vector>

#include "element.h"

// One binary, two instruction sets (FMA implies AVX), chosen when the library is loaded.
#ifndef MTU_FAST_CLONES  // tests/host makes each by itself
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MTU_FAST_CLONES __attribute__((target_clones("fma", "default")))
#else
#define MTU_FAST_CLONES
#endif
#endif

namespace mtu_fast::cpu {
namespace {

// The loop that does most of the work goes by blocks; columns are padded by one, so that it has no remainder.
constexpr int64_t WIDTH = 4;
typedef double Block __attribute__((vector_size(WIDTH * sizeof(double)), aligned(sizeof(double)), may_alias));
MTU_FAST_INLINE Block& block(double* p) { return *reinterpret_cast<Block*>(p); }
MTU_FAST_INLINE const Block& block(const double* p) { return *reinterpret_cast<const Block*>(p); }

constexpr double NONE = -INFINITY;  // shorter than any row

// NaN and -infinity as infinity: such a row becomes the next pivot, where it turns the result into NaN.
MTU_FAST_INLINE double or_infinity(double length) { return length - length == 0 ? length : INFINITY; }

struct Workspace {
  explicit Workspace(int64_t rows)
      : stride(rows + WIDTH), store((rows + 3) * stride), order(rows),
        L(store.data()), scale(L + rows * stride), left(scale + stride), y(left + stride) {}

  double* column(int64_t m) { return L + m * stride; }

  int64_t stride;
  std::vector<double> store;
  std::vector<int64_t> order;
  double *L, *scale, *left, *y;
};

struct Problem {
  int64_t rows;
  const double *gram, *rhs;  // rhs may be null: none
  const bool* active;        // may be null: all
  double tolerance;
};

// Collects the rows that may span, scaled to length 1. What is not finite stays in, to be seen in the result.
MTU_FAST_INLINE int64_t equilibrate(const Problem& p, Workspace& w) {
  int64_t n = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    const double length = p.gram[i * (p.rows + 1)];
    if ((p.active && !p.active[i]) || length <= 0) continue;
    w.order[n] = i;
    w.left[n] = length;
    w.y[n] = p.rhs ? p.rhs[i] : 0;
    ++n;
  }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const double length = w.left[k];
    w.scale[k] = 1 / std::sqrt(length);
    w.left[k] = or_infinity(length * w.scale[k] * w.scale[k]);
    w.y[k] *= w.scale[k];
  }
  return n;
}

// Brings the first of the longest remaining rows to place k.
MTU_FAST_INLINE void pivot(Workspace& w, int64_t k, double longest) {
  int64_t p = k;
  while (w.left[p] != longest) ++p;
  if (p == k) return;
  std::swap(w.order[k], w.order[p]);
  std::swap(w.scale[k], w.scale[p]);
  std::swap(w.left[k], w.left[p]);
  std::swap(w.y[k], w.y[p]);
  for (int64_t m = 0; m < k; ++m) std::swap(w.column(m)[k], w.column(m)[p]);
}

// L[k][j] for j > k: the pivot's row of the scaled G less what the columns before explain, over the pivot's root.
MTU_FAST_INLINE void make_column(Workspace& w, const double* G, int64_t k, int64_t n, double inverse) {
  double* c = w.column(k);
  const int64_t* order = w.order.data();
  for (int64_t j = k + 1; j < n; ++j) c[j] = G[order[j]] * w.scale[k] * w.scale[j];
  for (int64_t j = k + 1; j < n; j += WIDTH) {
    Block sum = block(c + j);
    int64_t m = 0;
    for (; m + 4 <= k; m += 4) {  // four at a time: a quarter of the chain of dependent additions
      const double *a = w.column(m), *b = w.column(m + 1), *d = w.column(m + 2), *e = w.column(m + 3);
      sum -= (a[k] * block(a + j) + b[k] * block(b + j)) + (d[k] * block(d + j) + e[k] * block(e + j));
    }
    for (; m < k; ++m) sum -= w.column(m)[k] * block(w.column(m) + j);
    block(c + j) = sum * inverse;
  }
  c[k] = inverse;
}

// Takes the new column out of the lengths and of the right-hand side that remain; the longest that is left.
MTU_FAST_INLINE double downdate(Workspace& w, int64_t k, int64_t n) {
  const double* __restrict__ c = w.column(k);
  double* __restrict__ left = w.left;
  double* __restrict__ y = w.y;
  const double z = y[k] * c[k];
  y[k] = z;
  double longest = NONE;
#pragma omp simd reduction(max : longest)
  for (int64_t j = k + 1; j < n; ++j) {
    left[j] = or_infinity(left[j] - c[j] * c[j]);
    y[j] -= z * c[j];
    longest = left[j] > longest ? left[j] : longest;
  }
  return longest;
}

MTU_FAST_INLINE void back_substitute(Workspace& w, int64_t rank) {
  for (int64_t k = rank - 1; k >= 0; --k) {
    const double* c = w.column(k);
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = k + 1; j < rank; ++j) sum += c[j] * w.y[j];
    w.y[k] = (w.y[k] - sum) * c[k];
  }
}

// The factor L of the scaled G and z of L z = rhs; the number of pivots.
MTU_FAST_INLINE int64_t factor(const Problem& p, Workspace& w) {
  const double least = p.tolerance * p.tolerance;
  const int64_t n = equilibrate(p, w);
  // all are of length 1 but for rounding, which is not to choose the first pivot
  double longest = n > 0 ? w.left[0] : NONE;
  for (int64_t k = 0; k < n; ++k) longest = w.left[k] < INFINITY ? longest : INFINITY;
  int64_t rank = 0;
  for (; rank < n && longest >= least; ++rank) {
    pivot(w, rank, longest);
    make_column(w, p.gram + w.order[rank] * p.rows, rank, n, longest < INFINITY ? 1 / std::sqrt(longest) : NAN);
    longest = downdate(w, rank, n);
  }
  return rank;
}

MTU_FAST_CLONES
int64_t solve_one(const Problem& p, double* x, Workspace& w) {
  const int64_t rank = factor(p, w);
  back_substitute(w, rank);
  for (int64_t i = 0; i < p.rows; ++i) x[i] = 0;
  for (int64_t k = 0; k < rank; ++k) x[w.order[k]] = w.y[k] * w.scale[k];
  return rank;
}

// Row k of L⁻¹, from the rows before it: X[m] at inverse + m * stride, with zeros to the end of the diagonal's block.
MTU_FAST_INLINE void invert_row(Workspace& w, double* inverse, int64_t k) {
  double* x = inverse + k * w.stride;
  const double root = w.column(k)[k];
  for (int64_t j = 0; j < k; j += WIDTH) {
    Block sum = {};
    int64_t m = j;
    for (; m + 4 <= k; m += 4) {
      const double *a = inverse + m * w.stride + j, *b = a + w.stride, *d = b + w.stride, *e = d + w.stride;
      sum -= (w.column(m)[k] * block(a) + w.column(m + 1)[k] * block(b)) +
             (w.column(m + 2)[k] * block(d) + w.column(m + 3)[k] * block(e));
    }
    for (; m < k; ++m) sum -= w.column(m)[k] * block(inverse + m * w.stride + j);
    block(x + j) = sum * root;
  }
  x[k] = root;
  for (int64_t j = k + 1; j % WIDTH != 0; ++j) x[j] = 0;
}

MTU_FAST_CLONES
void basis_one(const Problem& p, double* transform, bool* kept, double* inverse, Workspace& w) {
  const int64_t rank = factor(p, w);
  for (int64_t i = 0; i < p.rows * p.rows; ++i) transform[i] = 0;
  for (int64_t i = 0; i < p.rows; ++i) kept[i] = false;
  for (int64_t k = 0; k < rank; ++k) {
    invert_row(w, inverse, k);
    const double* x = inverse + k * w.stride;
    for (int64_t j = 0; j <= k; ++j) transform[w.order[k] * p.rows + w.order[j]] = x[j] * w.scale[j];
    kept[w.order[k]] = true;
  }
}

}  // namespace

void gram_schmidt(const GramSchmidt& batch, int64_t begin, int64_t end) {
  const int64_t R = batch.rows;
  Workspace workspace(R);
  for (int64_t b = begin; b < end; ++b) {
    const Problem problem{R, batch.gram + b * R * R, batch.rhs + b * R, batch.active, batch.tolerance};
    batch.rank[b] = solve_one(problem, batch.x + b * R, workspace);
  }
}

void basis(const Basis& batch, int64_t begin, int64_t end) {
  const int64_t R = batch.rows;
  Workspace workspace(R);
  std::vector<double> inverse(R * workspace.stride);
  for (int64_t b = begin; b < end; ++b) {
    const Problem problem{R, batch.gram + b * R * R, nullptr, nullptr, batch.tolerance};
    basis_one(problem, batch.transform + b * R * R, batch.kept + b * R, inverse.data(), workspace);
  }
}

}  // namespace mtu_fast::cpu
