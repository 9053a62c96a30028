// The exchanges of mtu_fast/_ops/complementary/_exchange.py, which says what they are, problem by problem.
//
// A row is active where its x may be positive, and s = 0 there. With A = M + ridge and `right` what stands for q, every
// step solves A x = -right on the m active rows by Cholesky: m³/6 multiply-adds, and no memory beyond a factor [n, n].

#include "complementary.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace mtu_fast::cpu {
namespace {

// As in _exchange.py, where each has its reason.
constexpr int PATIENCE = 5;
constexpr int64_t DESCENTS = 5;
constexpr double ROUNDING = 1e-13, RESIDUAL = 1e-12;
constexpr double FIRST = 1e-2, LATER = 1e-8;
constexpr int REPEATS = 40;
constexpr double RESTS = 2e-15;

class Solver {
 public:
  Solver(const double* M, int64_t n)
      : n(n), M(M), ridge(0), factor(n * n), right(n), s(n), found(n), x(n), tried(n), active(n), sides(n), at(n), m(0) {}

  // Whether the exchanges end; `result` is then the solution for q.
  bool solve(const double* q, bool dependent, double* result) {
    ridge = dependent ? FIRST : 0;
    for (int64_t j = 0; j < n; ++j) x[j] = 0, active[j] = q[j] < 0;
    for (int time = 0; time < REPEATS; ++time) {
      for (int64_t j = 0; j < n; ++j) right[j] = q[j] - ridge * x[j];
      if (!exchanged() && !descended()) return false;
      double change = 0, largest = 1;
      for (int64_t j = 0; j < n; ++j) {
        change = std::max(change, std::abs(tried[j] - x[j]));
        largest = std::max(largest, tried[j]);
      }
      std::swap(x, tried), std::swap(active, sides);
      if (ridge * change <= RESTS * largest) {  // what the ridge leaves in s is rounding
        std::copy(x.begin(), x.end(), result);
        return true;
      }
      ridge = LATER;
    }
    return false;
  }

 private:
  // `found` solves A_aa found = -right_a on the active rows of `sides`; false where A_aa is not positive definite.
  bool solve_active() {
    m = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (sides[j]) at[m++] = j;
    }
    for (int64_t i = 0; i < m; ++i) {
      double* __restrict__ row = factor.data() + i * n;  // L[i][0 .. i], the inverse of the pivot at i
      const double* of_M = M + at[i] * n;
      for (int64_t j = 0; j <= i; ++j) {
        const double* __restrict__ other = factor.data() + j * n;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < j; ++k) sum += row[k] * other[k];
        const double rest = of_M[at[j]] - sum;
        if (j < i) {
          row[j] = rest * other[j];
        } else {
          const double pivot = rest + ridge;
          if (!(pivot > 0)) return false;  // NaN, too
          row[i] = 1 / std::sqrt(pivot);
        }
      }
    }
    for (int64_t i = 0; i < m; ++i) {  // L z = -right
      const double* row = factor.data() + i * n;
      double sum = -right[at[i]];
      for (int64_t k = 0; k < i; ++k) sum -= row[k] * found[k];
      found[i] = sum * row[i];
    }
    for (int64_t i = m; i-- > 0;) {  // Lᵀ x = z, column by column of Lᵀ
      const double* __restrict__ row = factor.data() + i * n;
      const double value = found[i] * row[i];
      found[i] = value;
#pragma omp simd
      for (int64_t k = 0; k < i; ++k) found[k] -= row[k] * value;
    }
    return true;
  }

  // s = A x + right of x that is `found` on the active rows and 0 elsewhere.
  void make_s() {
    std::copy(right.begin(), right.end(), s.begin());
    for (int64_t i = 0; i < m; ++i) {
      const double* __restrict__ row = M + at[i] * n;
      const double value = found[i];
      double* __restrict__ out = s.data();
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) out[j] += row[j] * value;
      out[at[i]] += ridge * value;
    }
  }

  // Whether s is zero on the active rows, beside the largest x.
  bool holds(double largest) const {
    for (int64_t i = 0; i < m; ++i) {
      if (!(std::abs(s[at[i]]) <= RESIDUAL * std::max(1.0, largest))) return false;
    }
    return true;
  }

  // All wrong rows change sides at once, from those of `active`: `tried` and its `sides`.
  bool exchanged() {
    sides = active;
    int64_t fewest = n + 1;
    int patience = PATIENCE;
    while (patience > 0) {
      if (!solve_active()) return false;
      make_s();
      int64_t count = 0, next = 0;
      double largest = 0;
      for (int64_t j = 0; j < n; ++j) {
        const bool inside = next < m && at[next] == j;
        const double value = inside ? found[next++] : s[j];
        if (inside) largest = std::max(largest, value);
        const bool wrong = value < -ROUNDING;
        count += wrong;
        sides[j] = sides[j] != wrong;
      }
      if (count == 0) {
        take();
        return holds(largest);
      }
      patience = count < fewest ? PATIENCE : patience - 1;
      fewest = std::min(fewest, count);
    }
    return false;
  }

  // `tried` is `found` on the active rows, and 0 elsewhere.
  void take() {
    std::fill(tried.begin(), tried.end(), 0.0);
    for (int64_t i = 0; i < m; ++i) tried[at[i]] = std::max(found[i], 0.0);
  }

  // Down ½ xᵀA x + rightᵀx from the last x: the row with the least s joins, rows whose x comes to 0 leave.
  bool descended() {
    tried = x;
    for (int64_t j = 0; j < n; ++j) sides[j] = tried[j] > 0;
    for (int64_t step = 0; step < DESCENTS * n; ++step) {
      if (!solve_active()) return false;
      if (leave()) continue;
      take();
      for (int64_t i = 0; i < m; ++i) found[i] = tried[at[i]];
      make_s();
      if (!holds(m ? *std::max_element(found.begin(), found.begin() + m) : 0)) return false;
      for (int64_t i = 0; i < m; ++i) s[at[i]] = 0;
      const int64_t lowest = std::min_element(s.begin(), s.end()) - s.begin();
      if (s[lowest] >= -ROUNDING) return true;
      sides[lowest] = true;
    }
    return false;
  }

  // Goes towards `found` as far as `tried` stays positive; whether that was not all the way.
  bool leave() {
    double least = INFINITY;
    for (int64_t i = 0; i < m; ++i) {
      if (found[i] < -ROUNDING) least = std::min(least, tried[at[i]] / (tried[at[i]] - found[i]));
    }
    if (least == INFINITY) return false;
    for (int64_t i = 0; i < m; ++i) {
      double& value = tried[at[i]];
      const bool stops = found[i] < -ROUNDING && value / (value - found[i]) <= least;
      value = stops ? 0 : std::max(value + least * (found[i] - value), 0.0);
      if (stops) sides[at[i]] = false;
    }
    return true;
  }

  const int64_t n;
  const double* const M;
  double ridge;
  std::vector<double> factor, right, s, found, x, tried;
  std::vector<char> active, sides;
  std::vector<int64_t> at;  // the m active rows, ascending
  int64_t m;
};

bool all_finite(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double value) { return std::isfinite(value); });
}

}  // namespace

void complementary(const Complementary& batch, int64_t begin, int64_t end) {
  const int64_t n = batch.rows;
  const bool sound = all_finite(batch.M, n * n);  // a comparison with NaN would count as solved
  Solver solver(batch.M, n);
  for (int64_t k = begin; k < end; ++k) {
    const double* q = batch.q + k * n;
    double* x = batch.x + k * n;
    batch.ended[k] = sound && all_finite(q, n) && solver.solve(q, batch.dependent, x);
    if (!batch.ended[k]) std::fill(x, x + n, 0.0);
  }
}

}  // namespace mtu_fast::cpu
