// Chooses form and block size, and launches; the kernels are in gram_schmidt.cuh.

#include "gram_schmidt.cuh"

#include <algorithm>

namespace mtu_fast::cuda {
namespace {

constexpr int64_t MAX_BLOCKS = 1 << 30;          // further problems go to the same blocks
constexpr int64_t MAX_WORKSPACES = 1024;         // blocks with a matrix each in global memory

struct Form {
  int64_t width, bytes;  // columns of a panel, 0: the whole matrix in shared memory, -1: too many rows
};

// The small form where the matrix fits, else the widest panel that does.
Form form(int64_t rows) {
  int device = 0, limit = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (shared_bytes(rows, 0) <= limit) return {0, shared_bytes(rows, 0)};
  for (int64_t width = PANEL; width > 0; width /= 2) {
    if (shared_bytes(rows, width) <= limit) return {width, shared_bytes(rows, width)};
  }
  return {-1, 0};
}

template <typename Kernel>
const char* launch(Kernel small, Kernel blocked, const GramSchmidt& batch, void* stream) {
  if (batch.problems == 0) return "";
  const Form f = form(batch.rows);
  if (f.width < 0) return "too many rows for the shared memory of this device";
  const Kernel kernel = f.width == 0 ? small : blocked;
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(f.bytes));
  if (error == cudaSuccess) {
    const int64_t warps = std::max<int64_t>(1, (batch.rows + WARP - 1) / WARP);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(std::min(batch.problems, f.width == 0 ? MAX_BLOCKS : MAX_WORKSPACES)));
    config.blockDim = dim3(static_cast<unsigned>(std::min<int64_t>(warps * WARP, MAX_THREADS)));
    config.dynamicSmemBytes = static_cast<size_t>(f.bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, batch, static_cast<int>(f.width));
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

int64_t workspace_words(int64_t problems, int64_t rows) {
  const int64_t width = form(rows).width;
  return width > 0 ? std::min(problems, MAX_WORKSPACES) * rows * rows : width;
}

const char* solve(const GramSchmidt& batch, void* stream) {
  return launch(solve_kernel<false>, solve_kernel<true>, batch, stream);
}

const char* basis(const GramSchmidt& batch, void* stream) {
  return launch(basis_kernel<false>, basis_kernel<true>, batch, stream);
}

}  // namespace mtu_fast::cuda
