// One block factors one equilibrated Gram matrix A = L Lᵀ, largest remaining diagonal first. No row is ever moved: thread
// j owns row j (and j + threads, ...), and column k of L, made when row p becomes the k-th pivot, is stored in row p of
// the matrix, which nobody needs any more. So every row that is read or written lies along the threads.
//
//     left[j]    what remains of the squared length of row j; -infinity once it is a pivot or if it never may be one
//     order[k]   the k-th pivot            place[j]   when j became a pivot; R before that
//     y[j]       rhs less what the pivots explain
//     M[p][j]    entry at row j of the column made at pivot p, for j not yet a pivot; M[p][p] is 1 / its root
//
// With INVERSE, the half of M that L leaves free takes the inverse factor: M[p][j] for j a pivot before p. Its row p is
// made by the very sum that makes the column,
//
//     M[p][j] = (A[p][j] - Σ_m M[order[m]][p] M[order[m]][j]) / root,
//
// with A[p][j] = 0 and m from place[j] on.
//
// One barrier a step: the search for the largest diagonal. Where the matrix does not fit into shared memory it lies in
// global memory, the last columns in a panel in shared memory, and what remains is updated once for each panel.

#pragma once

#include <cmath>

#include "device.cuh"
#include "gram_schmidt.h"

namespace mtu_fast::cuda {

constexpr int MAX_THREADS = 512;
constexpr int TILE = 4;    // of the trailing update: TILE x TILE entries a thread
constexpr int PANEL = 32;  // columns at most

// The arrays of one block. `matrix` and `panel` are the same in the small form, where a column never leaves its row.
struct Block {
  int rows, pitch, width;  // R, words from row to row of the matrix, columns of a panel
  double *matrix, *panel, *left, *y, *scale;
  int *order, *place, *alive;
  uint64_t* best;  // two buffers of one candidate a warp
  int* who;
};

// Bytes that `carve` takes; `width` 0 means the small form, whose pitch is odd: a column then falls into all banks.
constexpr int64_t shared_bytes(int64_t rows, int64_t width) {
  const int64_t matrix = width == 0 ? rows * (rows | 1) : rows * width;
  return (matrix + 3 * rows) * 8 + 2 * WARP * 8 + (3 * rows + 2 * WARP + 1) * 4;
}

template <bool BLOCKED>
__device__ inline Block carve(int rows, int width) {
  SharedMemory memory;
  Block s;
  s.rows = rows;
  s.pitch = BLOCKED ? rows : rows | 1;
  s.width = width;
  s.panel = memory.take<double>(BLOCKED ? rows * width : rows * s.pitch);
  s.matrix = s.panel;
  s.left = memory.take<double>(rows);
  s.y = memory.take<double>(rows);
  s.scale = memory.take<double>(rows);
  s.best = memory.take<uint64_t>(2 * WARP);
  s.order = memory.take<int>(rows);
  s.place = memory.take<int>(rows);
  s.alive = memory.take<int>(rows + 1);  // and how many
  s.who = memory.take<int>(2 * WARP);
  return s;
}

// NaN and -infinity as infinity: such a row becomes the next pivot, where it turns the result into NaN.
__device__ inline double or_infinity(double length) { return length - length == 0 ? length : INFINITY; }

// Orders lengths as integers do; 0 is below all of them and means "no candidate", as does a negative length.
__device__ inline uint64_t key_of(double length) {
  return length >= 0 ? static_cast<uint64_t>(__double_as_longlong(length + 0.0)) + 1 : 0;
}
__device__ inline double length_of(uint64_t key) { return __longlong_as_double(static_cast<long long>(key - 1)); }

__device__ inline uint64_t warp_max(uint64_t key) {
  const unsigned high = __reduce_max_sync(ALL, static_cast<unsigned>(key >> 32));
  const bool in_it = static_cast<unsigned>(key >> 32) == high;
  const unsigned low = __reduce_max_sync(ALL, in_it ? static_cast<unsigned>(key) : 0u);
  return static_cast<uint64_t>(high) << 32 | low;
}

struct Pivot {
  int row;
  uint64_t key;
};

// The first of the longest remaining rows, the same for all threads; every earlier write of the block is seen after it.
__device__ inline Pivot find_pivot(const Block& s, int step) {
  uint64_t key = 0;
  int row = s.rows;
  for (int j = threadIdx.x; j < s.rows; j += blockDim.x) {
    // at first all are of length 1 but for rounding, which is not to choose
    const double left = s.left[j];
    const uint64_t own = key_of(step == 0 && left > 0 && left < INFINITY ? 1.0 : left);
    if (own > key) {
      key = own;
      row = j;
    }
  }
  const uint64_t longest = warp_max(key);
  row = __reduce_min_sync(ALL, key == longest ? row : s.rows);
  if (blockDim.x == WARP) {
    __syncwarp();
    return {row, longest};
  }
  uint64_t* best = s.best + (step & 1) * WARP;
  int* who = s.who + (step & 1) * WARP;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if (lane == 0) {
    best[warp] = longest;
    who[warp] = row;
  }
  __syncthreads();
  const bool used = lane < static_cast<int>(blockDim.x / WARP);
  key = used ? best[lane] : 0;
  row = used ? who[lane] : s.rows;
  const uint64_t all = warp_max(key);
  return {static_cast<int>(__reduce_min_sync(ALL, key == all ? row : s.rows)), all};
}

__device__ inline void equilibrate(const Block& s, const double* G, const double* rhs, const bool* active) {
  const int R = s.rows;
  for (int j = threadIdx.x; j < R; j += blockDim.x) {
    const double length = G[static_cast<int64_t>(j) * (R + 1)];
    const bool spans = (active == nullptr || active[j]) && !(length <= 0);
    const double scale = spans ? rsqrt(length) : 0;
    s.scale[j] = scale;
    s.left[j] = spans ? or_infinity(length * scale * scale) : -INFINITY;
    s.y[j] = spans && rhs != nullptr ? rhs[j] * scale : 0;
    s.place[j] = R;
  }
  __syncthreads();
}

// A[i][j] for rows that may span; the others hold NaN or whatever else is to be ignored, and are never asked for.
__device__ inline double scaled(const Block& s, const double* G, int i, int j) {
  return G[static_cast<int64_t>(i) * s.rows + j] * s.scale[i] * s.scale[j];
}

__device__ inline void load(const Block& s, const double* G) {
  const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
#pragma unroll 4
  for (int i = threadIdx.x / WARP; i < s.rows; i += warps) {
    for (int j = lane; j < s.rows; j += WARP) {
      const bool spans = s.left[i] >= 0 && s.left[j] >= 0;
      s.matrix[i * s.pitch + j] = spans ? scaled(s, G, i, j) : 0;
    }
  }
  __syncthreads();
}

// Σ_{m = first .. k-1} of column m at row p times column m at row j, where columns before `from` count as zero.
template <bool BLOCKED>
__device__ inline double explained(const Block& s, int first, int k, int p, int j, int from) {
  double sum[4] = {0, 0, 0, 0};
  int m = first;
  for (; m + 4 <= k; m += 4) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const double* c = BLOCKED ? s.panel + (m + u - first) * s.rows : s.matrix + s.order[m + u] * s.pitch;
      sum[u] += c[p] * (m + u >= from ? c[j] : 0);
    }
  }
  for (; m < k; ++m) {
    const double* c = BLOCKED ? s.panel + (m - first) * s.rows : s.matrix + s.order[m] * s.pitch;
    sum[0] += c[p] * (m >= from ? c[j] : 0);
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Step k: the pivot's column, taken out of the lengths and right-hand sides that remain.
template <bool BLOCKED, bool INVERSE>
__device__ inline void step(const Block& s, const double* G, int first, int k, Pivot pivot) {
  const int p = pivot.row;
  const double longest = length_of(pivot.key);
  const double inverse = longest < INFINITY ? rsqrt(longest) : NAN;
  const double z = s.y[p] * inverse;
  double* row = s.matrix + static_cast<int64_t>(p) * s.pitch;
  for (int j = threadIdx.x; j < s.rows; j += blockDim.x) {
    double c = 0;
    if (j == p) {
      c = inverse;
      s.order[k] = p;
      s.place[p] = k;
      s.left[p] = -INFINITY;
    } else if (s.left[j] > -INFINITY) {
      const double a = BLOCKED && first == 0 ? scaled(s, G, p, j) : row[j];
      c = (a - explained<BLOCKED>(s, first, k, p, j, 0)) * inverse;
      s.left[j] = or_infinity(s.left[j] - c * c);
      s.y[j] -= z * c;
    } else if (INVERSE && s.place[j] < k) {
      const int from = s.place[j];
      const double a = BLOCKED && from < first ? row[j] : 0;
      c = (a - explained<BLOCKED>(s, first, k, p, j, from)) * inverse;
    }
    row[j] = c;
    if (BLOCKED) s.panel[(k - first) * s.rows + j] = c;
  }
}

// Lists in `alive` the rows that may still become pivots, ascending, and how many at its end.
__device__ inline void list_alive(const Block& s) {
  if (threadIdx.x < WARP) {
    int count = 0;
    for (int base = 0; base < s.rows; base += WARP) {
      const int j = base + static_cast<int>(threadIdx.x);
      const bool alive = j < s.rows && s.left[j] > -INFINITY;
      const unsigned ballot = __ballot_sync(ALL, alive);
      if (alive) s.alive[count + __popc(ballot & ((1u << threadIdx.x) - 1u))] = j;
      count += __popc(ballot);
    }
    if (threadIdx.x == 0) s.alive[s.rows] = count;
  }
  __syncthreads();
}

// Entries `rows[a], columns[b]` of what is left: less the panel's products. Places at or beyond the count are repeated
// from the last and not written.
template <bool MIRRORED>
__device__ inline void update_tile(const Block& s, const double* G, int first, int end, const int* rows, int row_count,
                                   const int* columns, int column_count, int a0, int b0) {
  int row[TILE], column[TILE];
  double sum[TILE][TILE] = {};
#pragma unroll
  for (int t = 0; t < TILE; ++t) {
    row[t] = rows[a0 + t < row_count ? a0 + t : row_count - 1];
    column[t] = columns[b0 + t < column_count ? b0 + t : column_count - 1];
  }
  for (int m = 0; m < end - first; ++m) {
    const double* c = s.panel + m * s.rows;
    double at_row[TILE], at_column[TILE];
#pragma unroll
    for (int t = 0; t < TILE; ++t) {
      at_row[t] = c[row[t]];
      at_column[t] = c[column[t]];
    }
#pragma unroll
    for (int t = 0; t < TILE; ++t) {
#pragma unroll
      for (int u = 0; u < TILE; ++u) sum[t][u] += at_row[t] * at_column[u];
    }
  }
#pragma unroll
  for (int t = 0; t < TILE; ++t) {
#pragma unroll
    for (int u = 0; u < TILE; ++u) {
      if (a0 + t >= row_count || b0 + u >= column_count || (MIRRORED && a0 + t > b0 + u)) continue;
      double* entry = s.matrix + static_cast<int64_t>(row[t]) * s.pitch + column[u];
      if (!MIRRORED) {
        *entry = (s.place[column[u]] < first ? *entry : 0) - sum[t][u];
        continue;
      }
      // Either half from its own half, so that equal rows stay equal to the last bit.
      double* mirror = s.matrix + static_cast<int64_t>(column[u]) * s.pitch + row[t];
      const double below = first == 0 ? scaled(s, G, column[u], row[t]) : *mirror;
      *entry = (first == 0 ? scaled(s, G, row[t], column[u]) : *entry) - sum[t][u];
      *mirror = below - sum[t][u];
    }
  }
}

// Takes the panel of columns first .. end-1 out of what is left.
template <bool INVERSE>
__device__ inline void trailing_update(const Block& s, const double* G, int first, int end) {
  __syncthreads();
  list_alive(s);
  const int count = s.alive[s.rows], tiles = (count + TILE - 1) / TILE;
  for (int t = threadIdx.x; t < tiles * tiles; t += blockDim.x) {
    const int a = t / tiles * TILE, b = t % tiles * TILE;
    if (a <= b) update_tile<true>(s, G, first, end, s.alive, count, s.alive, count, a, b);
  }
  if (INVERSE) {
    // What the panel holds of L at rows that became pivots in it is no part of the inverse.
    for (int t = threadIdx.x; t < (end - first) * (end - first); t += blockDim.x) {
      const int m = t / (end - first), n = t % (end - first);
      if (m < n) s.panel[m * s.rows + s.order[first + n]] = 0;
    }
    __syncthreads();
    const int done = (end + TILE - 1) / TILE;
    for (int t = threadIdx.x; t < tiles * done; t += blockDim.x) {
      update_tile<false>(s, G, first, end, s.alive, count, s.order, end, t / done * TILE, t % done * TILE);
    }
  }
  __syncthreads();
}

// Factors; returns the rank. All that it wrote is seen by all threads.
template <bool BLOCKED, bool INVERSE>
__device__ inline int factor(const Block& s, const double* G, double tolerance) {
  const double least = tolerance * tolerance;
  int first = 0, k = 0;
  for (; k < s.rows; ++k) {
    Pivot pivot = find_pivot(s, k);
    if (pivot.key == 0 || length_of(pivot.key) < least) break;
    if (k == 0) {
      pivot.key = key_of(s.left[pivot.row]);
      __syncthreads();  // before the step overwrites it
    }
    if (BLOCKED && k - first == s.width) {
      trailing_update<INVERSE>(s, G, first, k);
      first = k;
    }
    step<BLOCKED, INVERSE>(s, G, first, k, pivot);
  }
  __syncthreads();
  return k;
}

// Lᵀ x = z from the last pivot to the first, in y: L's row p is column p of the matrix.
__device__ inline void back_substitute(const Block& s, int rank) {
  for (int j = threadIdx.x; j < s.rows; j += blockDim.x) {
    const double inverse = s.place[j] < rank ? s.matrix[static_cast<int64_t>(j) * (s.pitch + 1)] : 0;
    s.y[j] = s.place[j] < rank ? s.y[j] * inverse : 0;
    s.left[j] = inverse;
  }
  for (int k = rank - 1; k >= 0; --k) {
    __syncthreads();
    const int p = s.order[k];
    const double x = s.y[p] * s.left[p];
    for (int j = threadIdx.x; j < s.rows; j += blockDim.x) {
      if (s.place[j] < k) s.y[j] -= s.matrix[static_cast<int64_t>(j) * s.pitch + p] * x;
    }
  }
  __syncthreads();
}

template <bool BLOCKED>
__global__ void __launch_bounds__(MAX_THREADS) solve_kernel(GramSchmidt batch, int width) {
  const int R = static_cast<int>(batch.rows);
  Block s = carve<BLOCKED>(R, width);
  const int64_t matrix = batch.rows * batch.rows;
  if (BLOCKED) s.matrix = batch.workspace + blockIdx.x * matrix;
  for (int64_t b = blockIdx.x; b < batch.problems; b += gridDim.x) {
    const double* G = batch.gram + b * matrix;
    equilibrate(s, G, batch.rhs + b * R, batch.active);
    if (!BLOCKED) load(s, G);
    const int rank = factor<BLOCKED, false>(s, G, batch.tolerance);
    back_substitute(s, rank);
    for (int j = threadIdx.x; j < R; j += blockDim.x) {
      batch.x[b * R + j] = s.place[j] < rank ? s.y[j] * s.left[j] * s.scale[j] : 0;
    }
    if (threadIdx.x == 0) batch.rank[b] = rank;
    __syncthreads();
  }
}

template <bool BLOCKED>
__global__ void __launch_bounds__(MAX_THREADS) basis_kernel(GramSchmidt batch, int width) {
  const int R = static_cast<int>(batch.rows);
  Block s = carve<BLOCKED>(R, width);
  const int64_t matrix = batch.rows * batch.rows;
  for (int64_t b = blockIdx.x; b < batch.problems; b += gridDim.x) {
    const double* G = batch.gram + b * matrix;
    double* T = batch.inverse + b * matrix;
    if (BLOCKED) s.matrix = T;
    equilibrate(s, G, nullptr, nullptr);
    if (!BLOCKED) load(s, G);
    const int rank = factor<BLOCKED, true>(s, G, batch.tolerance);
    for (int i = 0; i < R; ++i) {
      const int place = s.place[i];
      for (int j = threadIdx.x; j < R; j += blockDim.x) {
        const bool in_it = place < rank && s.place[j] <= place;
        T[static_cast<int64_t>(i) * R + j] = in_it ? s.matrix[static_cast<int64_t>(i) * s.pitch + j] * s.scale[j] : 0;
      }
    }
    for (int j = threadIdx.x; j < R; j += blockDim.x) batch.kept[b * R + j] = s.place[j] < rank;
    __syncthreads();
  }
}

}  // namespace mtu_fast::cuda
