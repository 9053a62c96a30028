// Equilibrated pivoted Cholesky of many small Gram matrices, with the solution of one system each or the inverse factor.
#pragma once

#include <cstdint>

namespace mtu_fast::cpu {

struct GramSchmidt {
  int64_t rows;         // R
  const double* gram;   // [B, R, R], symmetric
  const double* rhs;    // [B, R]
  const bool* active;   // [R], the same for every problem
  double tolerance;     // length of a row scaled to 1 below which what is left of it counts as nothing
  double* x;            // [B, R], out: 0 on inactive and dependent rows
  int64_t* rank;        // [B], out
};

struct Basis {
  int64_t rows;        // R
  const double* gram;  // [B, R, R], symmetric
  double tolerance;    // as above
  double* transform;   // [B, R, R], out: T with T G Tᵀ = diag(kept)
  bool* kept;          // [B, R], out
};

// Solve problems begin .. end-1, one after the other: the result does not depend on how a batch is divided.
void gram_schmidt(const GramSchmidt& batch, int64_t begin, int64_t end);
void basis(const Basis& batch, int64_t begin, int64_t end);

}  // namespace mtu_fast::cpu
