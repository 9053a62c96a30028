// Elements of every float type, to float64 and back, without branches; and what every kernel here is compiled with.
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

struct Row {
  const void* data;  // consecutive elements
  Element element;
};

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

MTU_FAST_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MTU_FAST_INLINE double wide(double value) { return value; }
MTU_FAST_INLINE double wide(float value) { return value; }
MTU_FAST_INLINE double wide(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }
MTU_FAST_INLINE double wide(Half value) {
  // A number without a leading bit is lent one, which is then taken back; infinity and NaN keep the largest exponent.
  const uint32_t size = value.bits & 0x7fffu, tiny = size < 0x400, endless = size >= 0x7c00;
  const float lent = from_bits((0u - tiny) & (113u << 23));
  const float magnitude = from_bits((size << 13) + ((112u + tiny + 112u * endless) << 23)) - lent;
  return magnitude * static_cast<float>(1 - 2 * (value.bits >> 15));
}

// To nearest, ties to even; half precision by way of float32, as torch does it.
MTU_FAST_INLINE void narrow(double value, double& to) { to = value; }
MTU_FAST_INLINE void narrow(double value, float& to) { to = static_cast<float>(value); }
MTU_FAST_INLINE void narrow(double value, BFloat16& to) {
  const float rounded = static_cast<float>(value);
  const uint32_t bits = to_bits(rounded);
  to.bits = static_cast<uint16_t>(rounded != rounded ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
MTU_FAST_INLINE void narrow(double value, Half& to) {
  const uint32_t bits = to_bits(static_cast<float>(value)), size = bits & 0x7fffffffu;
  const uint32_t plain = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t tiny = to_bits(from_bits(size) + 0.5f) - to_bits(0.5f);  // the sum rounds to multiples of 2^-24
  uint32_t half = size < (113u << 23) ? tiny : plain;
  half = size >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on
  half = size > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(half | (bits >> 31) << 15);
}

// Elements start .. start+n-1 of a row, LANES together and then STEP from one group to the next, the last group filled up
// with zeros; fetches what lies `ahead` elements ahead.
template <int64_t STEP, class T>
MTU_FAST_INLINE void widen(const T* from, int64_t n, double* to, int64_t ahead) {
  for (; n >= LANES; n -= LANES, from += LANES, to += STEP) {
    __builtin_prefetch(from + ahead);
    for (int64_t l = 0; l < LANES; ++l) to[l] = wide(from[l]);
  }
  if (n > 0) {
    for (int64_t l = 0; l < LANES; ++l) to[l] = l < n ? wide(from[l]) : 0;
  }
}

template <int64_t STEP>
MTU_FAST_INLINE void widen(const Row& row, int64_t start, int64_t n, double* to, int64_t ahead) {
  switch (row.element) {
    case Element::Double: return widen<STEP>(static_cast<const double*>(row.data) + start, n, to, ahead);
    case Element::Float: return widen<STEP>(static_cast<const float*>(row.data) + start, n, to, ahead);
    case Element::BFloat16: return widen<STEP>(static_cast<const BFloat16*>(row.data) + start, n, to, ahead);
    case Element::Half: return widen<STEP>(static_cast<const Half*>(row.data) + start, n, to, ahead);
  }
}

// The sum of each of COUNT vectors to the front: neighbours are added until one is left.
template <int COUNT, int WIDTH, class T>
MTU_FAST_INLINE void fold(T* lanes) {
  if constexpr (WIDTH > 1) {
    constexpr int HALF = COUNT * WIDTH / 2;
    T sum[HALF];
    for (int q = 0; q < HALF; ++q) sum[q] = lanes[2 * q] + lanes[2 * q + 1];
    std::memcpy(lanes, sum, sizeof sum);
    fold<COUNT, WIDTH / 2>(lanes);
  }
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
