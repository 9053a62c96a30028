// Small kernels that break a rule of CUDA each, named by the argument: cuda_on_host.h must catch every one, and pass "none".

#include "../../csrc/cuda/device.cuh"

namespace {

using mtu_fast::cuda::SharedMemory;

enum Fault { NONE, RACE, DIVERGED, MISSED, ENDED_EARLY, OUT_OF_BOUNDS, TOO_MUCH, UNINITIALISED };
const char* const NAMES[] = {"none", "race", "diverged", "missed", "ended early", "out of bounds", "too much", "uninitialised"};

// Adds each thread's neighbour, after it has been written.
void neighbours(Fault fault, double* out) {
  SharedMemory memory;
  const int i = threadIdx.x, n = blockDim.x;
  double* values = memory.take<double>(fault == TOO_MUCH ? n + 1 : n);
  if (fault != UNINITIALISED || i != 5) values[i + (fault == OUT_OF_BOUNDS)] = i;
  if (fault == ENDED_EARLY && i == 3) return;
  if (fault == DIVERGED && i == 3) {
    __syncthreads();
  } else if (fault == MISSED && i == 3) {
    __syncwarp();
  } else if (fault != RACE) {
    __syncthreads();
  }
  const unsigned most = __reduce_max_sync(0xffffffffu, i);
  out[i] = values[i] + (fault == RACE ? 0 : values[(i + 1) % n]) + most;
  if (fault == RACE) values[(i + 1) % n] = out[i];
  __syncthreads();
  out[i] += values[i];
}

}  // namespace

int main(int count, char** arguments) {
  const auto name = std::find(std::begin(NAMES), std::end(NAMES), std::string(count == 2 ? arguments[1] : ""));
  if (name == std::end(NAMES)) host::fail("no such fault");
  const Fault fault = static_cast<Fault>(name - std::begin(NAMES));
  std::vector<std::vector<double>> results;
  for (host::Order order : {host::Order::ASCENDING, host::Order::DESCENDING, host::Order::RANDOM}) {
    host::order = order;
    results.emplace_back(64, 0.0);
    cudaLaunchConfig_t config = {dim3(2), dim3(64), 64 * sizeof(double), nullptr};
    if (cudaLaunchKernelEx(&config, neighbours, fault, results.back().data()) != cudaSuccess) host::fail("refused");
  }
  for (double value : results[0]) {
    if (std::isnan(value)) host::fail("NaN from shared memory that was not written");
  }
  for (const auto& other : results) {
    if (std::memcmp(other.data(), results[0].data(), 64 * sizeof(double)) != 0) host::fail("depends on the order of threads");
  }
}
