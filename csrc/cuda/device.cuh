// What device code takes from its surroundings: CUDA itself, or tests/host/cuda_on_host.h, which runs it on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace mtu_fast::cuda {

// Hands out the block's dynamic shared memory, array by array; every thread takes the same arrays in the same order.
class SharedMemory {
 public:
  template <typename T>
  __device__ T* take(int count) {
    extern __shared__ double memory[];
    T* array = reinterpret_cast<T*>(reinterpret_cast<char*>(memory) + used_);
    used_ += count * static_cast<int>(sizeof(T));
    return array;
  }

 private:
  int used_ = 0;
};

}  // namespace mtu_fast::cuda
#else
#include "cuda_on_host.h"
#endif

namespace mtu_fast::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

}  // namespace mtu_fast::cuda
