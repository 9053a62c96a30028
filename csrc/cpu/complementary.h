// x >= 0, s = M x + q >= 0, x·s = 0 for many q and one small positive semidefinite M.
#pragma once

#include <cstdint>

namespace mtu_fast::cpu {

struct Complementary {
  int64_t rows;      // n
  const double* M;   // [n, n], symmetric
  const double* q;   // [K, n]
  bool dependent;    // M is too near a singular one to do without a ridge
  double* x;         // [K, n], out
  bool* ended;       // [K], out: whether the exchanges ended; x is 0 where they did not
};

// Solve problems begin .. end-1, one after the other: the result does not depend on how a batch is divided.
void complementary(const Complementary& batch, int64_t begin, int64_t end);

}  // namespace mtu_fast::cpu
