// Elements as they come, widened to float64, and what every kernel here is compiled with.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MTU_FAST_X86 1
#define MTU_FAST_FOR(features) __attribute__((target(features)))
#endif
#define MTU_FAST_INLINE inline __attribute__((always_inline))

namespace mtu_fast::cpu {

enum class Element { Double, Float, BFloat16, Half };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr int64_t LANES = 8;  // float64 numbers that lie together

struct alignas(64) Line {
  double lane[LANES];
};

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

MTU_FAST_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MTU_FAST_INLINE double wide(double value) { return value; }
MTU_FAST_INLINE double wide(float value) { return value; }
MTU_FAST_INLINE double wide(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }
MTU_FAST_INLINE double wide(Half value) {
  // Without branches, so that it goes by vectors. A number without a leading bit is lent one, which is then taken back;
  // infinity and NaN keep the largest exponent.
  const uint32_t size = value.bits & 0x7fffu, tiny = size < 0x400, endless = size >= 0x7c00;
  const float lent = from_bits((0u - tiny) & (113u << 23));
  const float magnitude = from_bits((size << 13) + ((112u + tiny + 112u * endless) << 23)) - lent;
  return magnitude * static_cast<float>(1 - 2 * (value.bits >> 15));
}

#ifdef MTU_FAST_X86
enum class Vectors { Any, Avx2, Avx512 };

inline Vectors vectors() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Vectors::Avx512;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Vectors::Avx2 : Vectors::Any;
}
#endif

}  // namespace mtu_fast::cpu
