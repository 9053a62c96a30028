// Chooses form and block size, and launches; the kernels are in gram_schmidt.cuh.

#include "gram_schmidt.cuh"

#include <algorithm>
#include <string>

namespace mtu_fast::cuda {
namespace {

constexpr int64_t MAX_BLOCKS = 1 << 30;          // further problems go to the same blocks
constexpr int64_t MAX_WORKSPACES = 1024;         // blocks with a matrix each in global memory

struct Form {
  int64_t width, bytes;  // columns of a panel, 0: the whole matrix in shared memory, -1: too many rows
};

// "" or what CUDA says is wrong, by name; torch's next launch is not to report it once more.
std::string text(cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
}

// The small form where the matrix fits, else the widest panel that does.
cudaError_t form(int64_t rows, Form& found) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  int64_t width = 0;
  if (shared_bytes(rows, width) > limit) width = PANEL;
  while (width > 0 && shared_bytes(rows, width) > limit) width = width > 1 ? width / 2 : -1;
  found = {width, width < 0 ? 0 : shared_bytes(rows, width)};
  return cudaSuccess;
}

template <typename Kernel>
std::string launch(Kernel small, Kernel blocked, const GramSchmidt& batch, void* stream) {
  if (batch.problems == 0) return "";
  Form f = {};
  cudaError_t error = form(batch.rows, f);
  if (error != cudaSuccess) return text(error);
  if (f.width < 0) return "too many rows for the shared memory of this device";
  const Kernel kernel = f.width == 0 ? small : blocked;
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(f.bytes));
  if (error != cudaSuccess) return text(error);
  const int64_t warps = std::max<int64_t>(1, (batch.rows + WARP - 1) / WARP);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min(batch.problems, f.width == 0 ? MAX_BLOCKS : MAX_WORKSPACES)));
  config.blockDim = dim3(static_cast<unsigned>(std::min<int64_t>(warps * WARP, MAX_THREADS)));
  config.dynamicSmemBytes = static_cast<size_t>(f.bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  return text(cudaLaunchKernelEx(&config, kernel, batch, static_cast<int>(f.width)));
}

}  // namespace

std::string workspace(int64_t problems, int64_t rows, int64_t& words) {
  Form f = {};
  const cudaError_t error = form(rows, f);
  words = f.width > 0 ? std::min(problems, MAX_WORKSPACES) * rows * rows : f.width;
  return text(error);
}

std::string solve(const GramSchmidt& batch, void* stream) {
  return launch(solve_kernel<false>, solve_kernel<true>, batch, stream);
}

std::string basis(const GramSchmidt& batch, void* stream) {
  return launch(basis_kernel<false>, basis_kernel<true>, batch, stream);
}

}  // namespace mtu_fast::cuda
