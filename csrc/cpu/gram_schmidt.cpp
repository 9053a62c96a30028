// Left-looking: a column of L is made only when its row becomes a pivot, from one row of G and the columns before it, so
// G is read in place, once for each independent row, and never written. Rows are kept in pivot order, L by columns:
//
//     order[k]   the row of G that is k-th            scale[k]   1 / its length
//     left[k]    what remains of its squared length   y[k]       rhs, then z (L z = rhs), then the solution (Lᵀ y = z)
//     L[m][k]    entry of column m at that row, for k >= m
//
// All loops over k are contiguous; R³/6 multiply-adds, R(R + 5) doubles of workspace for a thread.

#include "gram_schmidt.h"

#include <cmath>
#include <utility>
#include <vector>

// One binary, three instruction sets, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MTU_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MTU_FAST_CLONES
#endif

namespace mtu_fast::cpu {
namespace {

struct Workspace {
  explicit Workspace(int64_t rows)
      : stride(rows), store(rows * (rows + 3)), order(rows),
        L(store.data()), scale(L + rows * rows), left(scale + rows), y(left + rows) {}

  double* column(int64_t m) { return L + m * stride; }

  int64_t stride;
  std::vector<double> store;
  std::vector<int64_t> order;
  double *L, *scale, *left, *y;
};

// Collects the rows that may span, scaled to length 1; a NaN stays in, to be seen in the result.
inline int64_t equilibrate(const GramSchmidt& batch, const double* G, const double* rhs, Workspace& w) {
  int64_t n = 0;
  for (int64_t i = 0; i < batch.rows; ++i) {
    const double length = G[i * (batch.rows + 1)];
    if (!batch.active[i] || length <= 0) continue;
    const double scale = 1 / std::sqrt(length);
    w.order[n] = i;
    w.scale[n] = scale;
    w.left[n] = length * scale * scale;
    w.y[n] = rhs[i] * scale;
    ++n;
  }
  return n;
}

// Brings the longest remaining row to place k; NaN counts as the longest of all.
inline void pivot(Workspace& w, int64_t k, int64_t n) {
  int64_t p = k;
  for (int64_t j = k + 1; j < n; ++j) {
    if (!(w.left[j] <= w.left[p]) && w.left[p] == w.left[p]) p = j;
  }
  if (p == k) return;
  std::swap(w.order[k], w.order[p]);
  std::swap(w.scale[k], w.scale[p]);
  std::swap(w.left[k], w.left[p]);
  std::swap(w.y[k], w.y[p]);
  for (int64_t m = 0; m < k; ++m) std::swap(w.column(m)[k], w.column(m)[p]);
}

// L[k][j] for j > k: the pivot's row of the scaled G less what the columns before explain, over the pivot's root.
inline void make_column(Workspace& w, const double* G, int64_t k, int64_t n, double root) {
  double* __restrict__ c = w.column(k);
  for (int64_t j = k + 1; j < n; ++j) c[j] = G[w.order[j]] * w.scale[k] * w.scale[j];
  int64_t m = 0;
  for (; m + 4 <= k; m += 4) {  // four columns a pass: c stays in registers
    const double *a = w.column(m), *b = w.column(m + 1), *d = w.column(m + 2), *e = w.column(m + 3);
    const double ak = a[k], bk = b[k], dk = d[k], ek = e[k];
    for (int64_t j = k + 1; j < n; ++j) c[j] -= (ak * a[j] + bk * b[j]) + (dk * d[j] + ek * e[j]);
  }
  for (; m < k; ++m) {
    const double* a = w.column(m);
    const double ak = a[k];
    for (int64_t j = k + 1; j < n; ++j) c[j] -= ak * a[j];
  }
  const double inverse = 1 / root;
  for (int64_t j = k + 1; j < n; ++j) c[j] *= inverse;
}

// Takes the new column out of the lengths and of the right-hand side that remain.
inline void downdate(Workspace& w, int64_t k, int64_t n, double root) {
  const double* __restrict__ c = w.column(k);
  double* __restrict__ left = w.left;
  double* __restrict__ y = w.y;
  const double z = y[k] / root;
  y[k] = z;
  for (int64_t j = k + 1; j < n; ++j) {
    left[j] -= c[j] * c[j] + 0 * c[j];  // 0 * inf is NaN: an infinity must not pass for nothing left
    y[j] -= z * c[j];
  }
}

inline void back_substitute(Workspace& w, int64_t rank) {
  for (int64_t k = rank - 1; k >= 0; --k) {
    const double* c = w.column(k);
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = k + 1; j < rank; ++j) sum += c[j] * w.y[j];
    w.y[k] = (w.y[k] - sum) / c[k];
  }
}

MTU_FAST_CLONES
int64_t solve_one(const GramSchmidt& batch, const double* G, const double* rhs, double* x, Workspace& w) {
  const double least = batch.tolerance * batch.tolerance;
  const int64_t n = equilibrate(batch, G, rhs, w);
  int64_t rank = 0;
  for (; rank < n; ++rank) {
    pivot(w, rank, n);
    if (w.left[rank] < least) break;
    const double root = std::sqrt(w.left[rank]);
    w.column(rank)[rank] = root;
    make_column(w, G + w.order[rank] * batch.rows, rank, n, root);
    downdate(w, rank, n, root);
  }
  back_substitute(w, rank);
  for (int64_t i = 0; i < batch.rows; ++i) x[i] = 0;
  for (int64_t k = 0; k < rank; ++k) x[w.order[k]] = w.y[k] * w.scale[k];
  return rank;
}

}  // namespace

void gram_schmidt(const GramSchmidt& batch, int64_t begin, int64_t end) {
  const int64_t R = batch.rows;
  Workspace workspace(R);
  for (int64_t b = begin; b < end; ++b) {
    batch.rank[b] = solve_one(batch, batch.gram + b * R * R, batch.rhs + b * R, batch.x + b * R, workspace);
  }
}

}  // namespace mtu_fast::cpu
