// What the ops ask of their arguments, before anything is allocated; `mtu_fast/_ops/_arguments.py` asks the same.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../cpu/walk.h"
#include "tensors.h"

namespace mtu_fast {

constexpr int64_t MOST_STEP = (int64_t{1} << 31) - 1;  // taps, stride, padding or dilation along an axis
constexpr double MOST_ELEMENTS = 0x1p40;               // of a block or a result: more than a machine holds
// Pixels of an image with its padding, and of what a dilated kernel spans: so many, or so many times those of the image.
constexpr double FEW_PIXELS = 0x1p20, PADDED = 64;
constexpr double MOST_MEETINGS = 0x1p36;  // of positions and taps, in an image
constexpr double MOST_TABLE = 0x1p27;     // entries of the tables of positions and taps that a kernel makes

// As a double: products of sizes may be beyond int64.
template <class Numbers>
double product(const Numbers& sizes, int64_t least = 0) {
  double n = 1;
  for (int64_t size : sizes) n *= static_cast<double>(std::max(size, least));
  return n;
}

inline void check_precision(const char* op, const std::string& precision) {
  STD_TORCH_CHECK(precision == "highest" || precision == "high" || precision == "medium", op, ": precision is ", precision,
                  ", expected highest, high or medium");
}

inline void check_size(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(product(t.sizes(), 1) <= MOST_ELEMENTS, op, ": ", name,
                  ": expected at most 2**40 elements, sizes of 0 aside");
}

inline void check_floats(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, ": expected every block on the CPU");
  STD_TORCH_CHECK(element(t), op, ": ", name, ": expected float64, float32, bfloat16 or float16");
  check_size(op, name, t);
}

inline void check_floats(const char* op, const char* name, const std::vector<Tensor>& blocks) {
  double rows = 0;
  for (const Tensor& t : blocks) {
    check_floats(op, name, t);
    if (t.dim() > 0) rows += static_cast<double>(t.size(0));
  }
  STD_TORCH_CHECK(rows * rows <= MOST_ELEMENTS, op, ": ", name, ": expected at most 2**20 rows in all, got ", rows);
}

// A number an axis each, that can be counted; positions and lengths computed from them stay within int64.
inline void check_walk(const char* op, const cpu::Walk& walk) {
  const auto& [kernel, stride, padding, dilation] = walk;
  const size_t axes = kernel.size();
  STD_TORCH_CHECK(stride.size() == axes && padding.size() == axes && dilation.size() == axes, op,
                  ": kernel, stride, padding and dilation differ in length: ", axes, ", ", stride.size(), ", ",
                  padding.size(), " and ", dilation.size());
  for (size_t a = 0; a < axes; ++a) {
    STD_TORCH_CHECK(kernel[a] > 0 && stride[a] > 0 && padding[a] >= 0 && dilation[a] > 0, op,
                    ": expected positive kernel, stride and dilation and no negative padding, got ", kernel[a], ", ",
                    stride[a], ", ", dilation[a], " and ", padding[a], " along axis ", a);
    const auto most = [&](const char* name, int64_t found) {
      STD_TORCH_CHECK(found <= MOST_STEP, op, ": ", name, " is ", found, " along axis ", a, ", expected at most ", MOST_STEP);
    };
    most("kernel", kernel[a]), most("stride", stride[a]), most("padding", padding[a]), most("dilation", dilation[a]);
  }
}

// That b lies on the grid on which the kernel walks over x, and that neither takes more room than images should.
inline void check_grid(const char* op, size_t block, const Tensor& x, const Tensor& b, const cpu::Walk& walk) {
  double image = 1, padded = 1, span = 1, meetings = 1;
  for (size_t a = 0; a < walk.kernel.size(); ++a) {
    const int64_t size = x.size(3 + a), reach = walk.dilation[a] * (walk.kernel[a] - 1) + 1;
    const int64_t room = size + 2 * walk.padding[a] - reach;
    const int64_t expected = room < 0 ? 0 : room / walk.stride[a] + 1;
    STD_TORCH_CHECK(b.size(3 + a) == expected, op, ": block ", block, " has ", b.size(3 + a),
                    " output positions along axis ", a, ", expected ", expected);
    image *= size, padded *= size + 2.0 * walk.padding[a], span *= reach;
    meetings *= static_cast<double>(expected) * walk.kernel[a];
  }
  const double most = std::max(FEW_PIXELS, PADDED * image);
  STD_TORCH_CHECK(padded <= most, op, ": padding: images of block ", block, " have ", padded,
                  " pixels with it, expected at most ", most);
  STD_TORCH_CHECK(span <= most, op, ": kernel, dilation: they span ", span, " pixels, expected at most ", most);
  STD_TORCH_CHECK(meetings <= MOST_MEETINGS, op, ": kernel: its taps meet ", meetings, " positions, expected at most 2**36");
}

// That a table of all taps at all positions, or at all lines of them, can be held.
inline void check_table(const char* op, const Tensor& b, const cpu::Walk& walk, bool by_lines) {
  double entries = product(walk.kernel);
  const size_t axes = walk.kernel.size();
  for (size_t a = 0; a + by_lines < axes; ++a) entries *= static_cast<double>(b.size(3 + a));
  STD_TORCH_CHECK(entries <= MOST_TABLE, op, ": kernel: its taps at all positions are ", entries,
                  ", expected at most 2**27; take smaller images, or rows by torch's own convolution");
}

}  // namespace mtu_fast
