// Launchers of the CUDA kernels behind `gram_schmidt` and `basis`; all pointers are device pointers.
#pragma once

#include <cstdint>
#include <string>

namespace mtu_fast::cuda {

struct GramSchmidt {
  int64_t problems;    // B
  int64_t rows;        // R
  const double* gram;  // [B, R, R], symmetric
  double tolerance;    // length of a row scaled to 1 below which what is left of it counts as nothing

  // The solution of one system each: `gram_schmidt`.
  const double* rhs = nullptr;   // [B, R]
  const bool* active = nullptr;  // [R], the same for every problem
  double* x = nullptr;           // [B, R], out: 0 on inactive and dependent rows
  int64_t* rank = nullptr;       // [B], out
  double* workspace = nullptr;   // of `workspace` words

  // Or the inverse factor: `basis`.
  double* inverse = nullptr;  // [B, R, R], out: T
  bool* kept = nullptr;       // [B, R], out
};

// All three return "" or what is wrong, an error of CUDA by its name.

// Float64 words that `solve` needs on the current device; 0 where the matrix fits into shared memory. -1: the device
// serves no problem of so many rows.
std::string workspace(int64_t problems, int64_t rows, int64_t& words);

// `stream` is a cudaStream_t; nothing is allocated or waited for.
std::string solve(const GramSchmidt& batch, void* stream);
std::string basis(const GramSchmidt& batch, void* stream);

}  // namespace mtu_fast::cuda
