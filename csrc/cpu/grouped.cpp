// Images and gradients are laid out in padded boxes, zeros between their lines. A tap is then one distance for all
// positions, and its sum an inner product of two stretches of memory; as many taps as registers allow are summed at once.

#include "grouped.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace mtu_fast::cpu {
namespace {

constexpr int64_t MOST = 9;          // taps at once: a 3x3 kernel's, whose sums fit into sixteen registers
constexpr int64_t SUMMED = 1 << 11;  // positions at once: they and what taps reach stay in the nearest cache
constexpr int64_t LONGEST = 16;      // elements of a vector, at most
constexpr int64_t PARTS = 64;        // at least, where there are as many output channels: for the threads
constexpr int64_t LAID_OUT = 4;      // multiply-adds that laying out an element takes, about

template <class E, class T>
MTU_FAST_INLINE void lay_out(const E* from, const std::vector<Segment>& segments, int64_t step, T* to) {
  for (const Segment& part : segments) {
    const E* own = from + part.from;
    T* there = to + part.to;
    if (step == 1) {
      for (int64_t i = 0; i < part.length; ++i) there[i] = wide(own[i]);
    } else {
      for (int64_t i = 0; i < part.length; ++i) there[i] = wide(own[i * step]);
    }
  }
}

template <class T>
MTU_FAST_INLINE void lay_out(const Block& block, int64_t offset, const std::vector<Segment>& segments, int64_t step, T* to) {
  switch (block.element) {
    case Element::Double: return lay_out(static_cast<const double*>(block.data) + offset, segments, step, to);
    case Element::Float: return lay_out(static_cast<const float*>(block.data) + offset, segments, step, to);
    case Element::BFloat16: return lay_out(static_cast<const BFloat16*>(block.data) + offset, segments, step, to);
    case Element::Half: return lay_out(static_cast<const Half*>(block.data) + offset, segments, step, to);
  }
}

// sums[k] += Σ_i b[i] x[i + shift[k]], i to the end of the last vector.
template <class T, int BYTES, int TAPS>
MTU_FAST_INLINE void add_taps(const T* b, const T* x, const int64_t* shift, int64_t n, T* sums) {
  typedef T Vector __attribute__((vector_size(BYTES), may_alias, aligned(alignof(T))));
  constexpr int EACH = BYTES / sizeof(T);
  const T* from[TAPS];
  for (int k = 0; k < TAPS; ++k) from[k] = x + shift[k];
  Vector part[TAPS] = {};
  for (int64_t i = 0; i < n; i += EACH) {
    const Vector own = *reinterpret_cast<const Vector*>(b + i);
#pragma GCC unroll 16
    for (int k = 0; k < TAPS; ++k) part[k] += own * *reinterpret_cast<const Vector*>(from[k] + i);
  }
  T lanes[TAPS * EACH];
  std::memcpy(lanes, part, sizeof lanes);
  fold<TAPS, EACH>(lanes);
  for (int k = 0; k < TAPS; ++k) sums[k] += lanes[k];
}

template <class T, int BYTES>
MTU_FAST_INLINE void add_products(const T* b, const T* x, const int64_t* shift, int64_t taps, int64_t n, T* sums) {
  for (int64_t start = 0; start < n; start += SUMMED, b += SUMMED, x += SUMMED) {
    const int64_t length = std::min(SUMMED, n - start);
    for (int64_t first = 0, count; first < taps; first += count) {
      const int64_t turns = (taps - first + MOST - 1) / MOST;
      count = (taps - first + turns - 1) / turns;
      const int64_t* by = shift + first;
      switch (count) {
        case 1: add_taps<T, BYTES, 1>(b, x, by, length, sums + first); break;
        case 2: add_taps<T, BYTES, 2>(b, x, by, length, sums + first); break;
        case 3: add_taps<T, BYTES, 3>(b, x, by, length, sums + first); break;
        case 4: add_taps<T, BYTES, 4>(b, x, by, length, sums + first); break;
        case 5: add_taps<T, BYTES, 5>(b, x, by, length, sums + first); break;
        case 6: add_taps<T, BYTES, 6>(b, x, by, length, sums + first); break;
        case 7: add_taps<T, BYTES, 7>(b, x, by, length, sums + first); break;
        case 8: add_taps<T, BYTES, 8>(b, x, by, length, sums + first); break;
        default: add_taps<T, BYTES, 9>(b, x, by, length, sums + first);
      }
    }
  }
}

struct Plan {
  const Block &x, &b;
  const Padded& box;
  int64_t groups, inputs, outputs, slices;
};

template <class T, int BYTES>
MTU_FAST_INLINE void form(const Plan& plan, int64_t begin, int64_t end, T* rows) {
  const Padded& box = plan.box;
  const Sizes &x_step = plan.x.stride, &b_step = plan.b.stride;
  const int64_t kernel = box.shift.size(), taps = kernel * plan.inputs;
  std::vector<T> images(plan.inputs * box.size + LONGEST), gradients(round_up(box.span, LONGEST));
  std::vector<int64_t> shift;  // of the taps under each channel
  for (int64_t c = 0; c < plan.inputs; ++c) {
    for (int64_t by : box.shift) shift.push_back(c * box.size + by);
  }
  for (int64_t part = begin; part < end; ++part) {
    const int64_t slice = part % plan.slices, whole = part / plan.slices;
    const int64_t row = whole / plan.groups, group = whole % plan.groups;
    const int64_t first = slice * plan.outputs / plan.slices, last = (slice + 1) * plan.outputs / plan.slices;
    T* out = rows + whole * plan.outputs * taps;
    for (int64_t f = 0; f < plan.x.size[1]; ++f) {
      for (int64_t c = 0; c < plan.inputs; ++c) {
        const int64_t at = row * x_step[0] + f * x_step[1] + (group * plan.inputs + c) * x_step[2];
        lay_out(plan.x, at, box.pixels, box.step, images.data() + c * box.size);
      }
      for (int64_t o = first; o < last; ++o) {
        const int64_t at = row * b_step[0] + f * b_step[1] + (group * plan.outputs + o) * b_step[2];
        lay_out(plan.b, at, box.positions, box.grid_step, gradients.data());
        add_products<T, BYTES>(gradients.data(), images.data(), shift.data(), taps, box.span, out + o * taps);
      }
    }
  }
}

// One binary, three instruction sets, chosen at the first call.
template <class T>
using Form = void (*)(const Plan&, int64_t, int64_t, T*);

#ifdef MTU_FAST_X86
template <class T>
MTU_FAST_FOR("avx512f,avx512vl,avx512dq,fma")
void form_avx512(const Plan& plan, int64_t begin, int64_t end, T* rows) {
  form<T, 64>(plan, begin, end, rows);
}
template <class T>
MTU_FAST_FOR("avx2,fma")
void form_avx2(const Plan& plan, int64_t begin, int64_t end, T* rows) {
  form<T, 32>(plan, begin, end, rows);
}
template <class T>
void form_any(const Plan& plan, int64_t begin, int64_t end, T* rows) {
  form<T, 16>(plan, begin, end, rows);
}

template <class T>
Form<T> best() {
  switch (vectors()) {
    case Vectors::Avx512: return form_avx512<T>;
    case Vectors::Avx2: return form_avx2<T>;
    default: return form_any<T>;
  }
}
#else
template <class T>
void form_any(const Plan& plan, int64_t begin, int64_t end, T* rows) {
  form<T, 16>(plan, begin, end, rows);
}

template <class T>
Form<T> best() {
  return form_any<T>;
}
#endif

}  // namespace

Grouped::Grouped(const Block& x, const Block& b, int64_t groups, const Walk& walk)
    : x_(x), b_(b), groups_(groups), inputs_(x.size[2] / groups), outputs_(b.size[2] / groups) {
  const auto spatial = [](const Sizes& all) { return Sizes(all.begin() + 3, all.end()); };
  box_ = padded(walk, spatial(x.size), spatial(b.size), spatial(x.stride), spatial(b.stride));
  slices_ = std::clamp(PARTS / std::max<int64_t>(1, x.size[0] * groups), int64_t{1}, std::max<int64_t>(1, outputs_));
}

int64_t Grouped::work() const {
  const int64_t products = inputs_ * box_.shift.size() * box_.span;
  return x_.size[1] * ((products + LAID_OUT * box_.span) * outputs_ / slices_ + LAID_OUT * inputs_ * box_.size);
}

void Grouped::form(int64_t begin, int64_t end, void* rows) const {
  static const Form<double> form_double = best<double>();
  static const Form<float> form_float = best<float>();
  const Plan plan{x_, b_, box_, groups_, inputs_, outputs_, slices_};
  is_double() ? form_double(plan, begin, end, static_cast<double*>(rows))
              : form_float(plan, begin, end, static_cast<float*>(rows));
}

}  // namespace mtu_fast::cpu
