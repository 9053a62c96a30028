// Runs device code on the CPU, to be compiled by g++ with AddressSanitizer: blocks one after the other, threads as fibers
// that change only at barriers and warp collectives. What it finds, it names, and exits with 1:
//
//     a barrier or collective that not every thread it waits for reaches, or that threads reach at different places;
//     shared memory taken differently by two threads, or more than the launch asks for.
//
// Each shared array is an allocation of its own, filled with NaN (integers: -1), so that AddressSanitizer sees a step
// beyond it. Between barriers threads run in `host::order`; a result that depends on it betrays a missing barrier.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum class Order { ASCENDING, DESCENDING, RANDOM };
inline Order order = Order::ASCENDING;
inline int shared_limit = 227 * 1024;  // bytes a block may ask for; negative: the device does not answer

constexpr unsigned WARP = 32;
constexpr size_t STACK = 128 * 1024;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "cuda_on_host: %s (block %u)\n", what.c_str(), blockIdx.x);
  std::fflush(stderr);
  std::_Exit(1);
}

struct Site {
  const char* what = nullptr;
  const char* file = "";
  int line = 0;
  unsigned mask = 0;  // lanes of the warp, 0: the whole block
  bool operator==(const Site& s) const { return what == s.what && line == s.line && mask == s.mask && !std::strcmp(file, s.file); }
  std::string text() const { return std::string(what) + " at " + file + ":" + std::to_string(line); }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* fake_stack = nullptr;
  unsigned index = 0;
  bool done = false, waiting = false;
  Site at;
  uint64_t offered = 0;
  size_t arrays = 0;  // shared arrays taken so far
};

struct Array {
  std::unique_ptr<char[]> bytes;
  size_t size;
};

class Launch {
 public:
  Launch(unsigned threads, size_t shared, std::function<void()> kernel) : shared_(shared), kernel_(std::move(kernel)), fibers_(threads) {}

  void run_block() {
    arrays_.clear();
    used_ = 0;
    std::vector<unsigned> turn(fibers_.size());
    for (unsigned i = 0; i < turn.size(); ++i) turn[i] = order == Order::DESCENDING ? turn.size() - 1 - i : i;
    for (unsigned i = 0; i < fibers_.size(); ++i) start(i);
    std::mt19937 random(1);
    for (size_t left = fibers_.size(); left > 0;) {
      if (order == Order::RANDOM) std::shuffle(turn.begin(), turn.end(), random);
      bool moved = false;
      for (unsigned i : turn) {
        if (fibers_[i].done || fibers_[i].waiting) continue;
        resume(fibers_[i]);
        moved = true;
        left -= fibers_[i].done;
        if (!fibers_[i].done) release(fibers_[i]);
      }
      if (!moved) report_deadlock();
    }
  }

  // Waits until all threads that `site` is for have come to it; what they offered is then in `gathered`.
  void meet(const Site& site, uint64_t offered = 0) {
    Fiber& f = *running_;
    f.at = site;
    f.offered = offered;
    f.waiting = true;
    leave(f, &f.fake_stack);
  }

  uint64_t offered_by(unsigned lane) const { return fibers_[running_->index / WARP * WARP + lane].last; }

  void* take(size_t size) {
    Fiber& f = *running_;
    if (f.arrays == arrays_.size()) {
      used_ += size;
      if (used_ > shared_) fail("shared memory: " + std::to_string(used_) + " bytes taken, launched with " + std::to_string(shared_));
      arrays_.push_back({std::unique_ptr<char[]>(new char[size]), size});
      std::memset(arrays_.back().bytes.get(), 0xff, size);
    }
    Array& array = arrays_[f.arrays++];
    if (array.size != size) fail("shared memory: thread " + std::to_string(f.index) + " takes another array than the first");
    return array.bytes.get();
  }

  static inline Launch* current = nullptr;

 private:
  struct Thread : Fiber {
    uint64_t last = 0;
  };

  void start(unsigned i) {
    Thread& f = fibers_[i];
    f.index = i;
    f.done = f.waiting = false;
    f.arrays = 0;
    f.fake_stack = nullptr;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Launch::enter, 0);
  }

  static void enter() {
    Launch& self = *current;
    __sanitizer_finish_switch_fiber(nullptr, &self.stack_, &self.stack_size_);
    self.kernel_();
    self.running_->done = true;
    self.leave(*self.running_, nullptr);
  }

  void resume(Thread& f) {
    running_ = &f;
    threadIdx.x = f.index;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f.stack.get(), STACK);
    swapcontext(&main_, &f.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  }

  void leave(Fiber& f, void** fake) {
    __sanitizer_start_switch_fiber(fake, stack_, stack_size_);
    swapcontext(&f.context, &main_);
    __sanitizer_finish_switch_fiber(f.fake_stack, &stack_, &stack_size_);
  }

  // Lets everybody go once all have come to where `f` waits.
  void release(const Thread& f) {
    const unsigned base = f.at.mask ? f.index / WARP * WARP : 0, count = f.at.mask ? WARP : fibers_.size();
    const auto waits_for = [&](unsigned i) { return f.at.mask == 0 || (f.at.mask >> i & 1); };
    if (!waits_for(f.index - base) && f.at.mask) fail("thread " + std::to_string(f.index) + " is not in the mask of " + f.at.text());
    for (unsigned i = 0; i < count; ++i) {
      if (!waits_for(i)) continue;
      if (base + i >= fibers_.size()) fail(f.at.text() + " waits for lanes that do not exist");
      const Thread& other = fibers_[base + i];
      if (other.done) fail(f.at.text() + ": thread " + std::to_string(other.index) + " has ended without it");
      if (!other.waiting) return;
      if (!(other.at == f.at)) {
        if (other.at.mask && !f.at.mask) return;  // still within its warp, or a deadlock
        fail("divergence: thread " + std::to_string(f.index) + " waits in " + f.at.text() + ", thread " +
             std::to_string(other.index) + " in " + other.at.text());
      }
    }
    for (unsigned i = 0; i < count; ++i) {
      if (!waits_for(i)) continue;
      fibers_[base + i].waiting = false;
      fibers_[base + i].last = fibers_[base + i].offered;
    }
  }

  void report_deadlock() {
    for (const Thread& f : fibers_) {
      if (f.waiting) fail("deadlock: thread " + std::to_string(f.index) + " waits in " + f.at.text());
    }
    fail("deadlock");
  }

  size_t shared_, used_ = 0;
  std::function<void()> kernel_;
  std::vector<Thread> fibers_;
  std::vector<Array> arrays_;
  Fiber* running_ = nullptr;
  ucontext_t main_;
  const void* stack_ = nullptr;
  size_t stack_size_ = 0;
};

inline unsigned lane() { return threadIdx.x % WARP; }

}  // namespace host

#define HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(HOST_SITE) { host::Launch::current->meet({"__syncthreads", file, line, 0}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, HOST_SITE) {
  host::Launch::current->meet({"__syncwarp", file, line, mask});
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, HOST_SITE) {
  host::Launch::current->meet({"__reduce_max_sync", file, line, mask}, value);
  unsigned result = 0;
  for (unsigned i = 0; i < host::WARP; ++i) {
    if (mask >> i & 1) result = std::max(result, static_cast<unsigned>(host::Launch::current->offered_by(i)));
  }
  return result;
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned value, HOST_SITE) {
  host::Launch::current->meet({"__reduce_min_sync", file, line, mask}, value);
  unsigned result = ~0u;
  for (unsigned i = 0; i < host::WARP; ++i) {
    if (mask >> i & 1) result = std::min(result, static_cast<unsigned>(host::Launch::current->offered_by(i)));
  }
  return result;
}

inline unsigned __ballot_sync(unsigned mask, bool value, HOST_SITE) {
  host::Launch::current->meet({"__ballot_sync", file, line, mask}, value);
  unsigned result = 0;
  for (unsigned i = 0; i < host::WARP; ++i) {
    if (mask >> i & 1) result |= static_cast<unsigned>(host::Launch::current->offered_by(i)) << i;
  }
  return result;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, HOST_SITE) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  host::Launch::current->meet({"__shfl_sync", file, line, mask}, bits);
  bits = host::Launch::current->offered_by(static_cast<unsigned>(source) % host::WARP);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidDevice };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  if (host::shared_limit < 0) return cudaErrorInvalidDevice;
  return *value = host::shared_limit, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= host::shared_limit ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (config->blockDim.x == 0 || config->blockDim.x > 1024 || config->gridDim.x == 0) return cudaErrorInvalidValue;
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  host::Launch launch(blockDim.x, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  host::Launch::current = &launch;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) launch.run_block();
  host::Launch::current = nullptr;
  return cudaSuccess;
}

namespace mtu_fast::cuda {

class SharedMemory {
 public:
  template <typename T>
  T* take(int count) {
    return static_cast<T*>(host::Launch::current->take(count * sizeof(T)));
  }
};

}  // namespace mtu_fast::cuda
