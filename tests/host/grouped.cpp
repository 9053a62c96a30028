// Rows of convolutions under AddressSanitizer: every array ends where its elements do. Sums are compared with the definition.
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "../../csrc/cpu/grouped.h"

using namespace mtu_fast::cpu;

namespace {

struct Case {
  int64_t rows, frames, inputs, outputs, groups;
  Sizes kernel, stride, padding, dilation, image;
};

int64_t product(const Sizes& sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) n *= size;
  return n;
}

Sizes dense(const Sizes& size) {
  Sizes stride(size.size());
  int64_t n = 1;
  for (size_t a = size.size(); a-- > 0;) stride[a] = n, n *= size[a];
  return stride;
}

// Coordinates of the n-th element.
Sizes at(int64_t n, const Sizes& size) {
  Sizes found(size.size());
  for (size_t a = size.size(); a-- > 0;) found[a] = n % size[a], n /= size[a];
  return found;
}

template <class T>
bool right(const Case& c, Element element, int64_t cut) {
  const size_t axes = c.kernel.size();
  Sizes grid(axes), x_size{c.rows, c.frames, c.inputs}, b_size{c.rows, c.frames, c.outputs};
  for (size_t a = 0; a < axes; ++a) {
    grid[a] = (c.image[a] + 2 * c.padding[a] - c.dilation[a] * (c.kernel[a] - 1) - 1) / c.stride[a] + 1;
  }
  x_size.insert(x_size.end(), c.image.begin(), c.image.end());
  b_size.insert(b_size.end(), grid.begin(), grid.end());
  const std::unique_ptr<T[]> x(new T[product(x_size)]), b(new T[product(b_size)]);
  for (int64_t n = 0; n < product(x_size); ++n) x[n] = n * 7 % 5 - 2;  // small integers: any order gives the same sums
  for (int64_t n = 0; n < product(b_size); ++n) b[n] = n * 11 % 7 - 3;

  const int64_t inputs = c.inputs / c.groups, outputs = c.outputs / c.groups, taps = product(c.kernel);
  const int64_t count = c.rows * c.outputs * inputs * taps;
  const std::unique_ptr<T[]> found(new T[count]());
  const Grouped rows({x.get(), element, x_size, dense(x_size)}, {b.get(), element, b_size, dense(b_size)}, c.groups,
                     {c.kernel, c.stride, c.padding, c.dilation});
  for (int64_t begin = 0; begin < rows.parts(); begin += cut) {
    rows.form(begin, std::min(begin + cut, rows.parts()), found.get());
  }

  const int64_t pixels = product(c.image), positions = product(grid);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t tap = n % taps, channel = n / taps % inputs, whole = n / (taps * inputs);
    const int64_t o = whole % c.outputs, row = whole / c.outputs;
    const Sizes offset = at(tap, c.kernel);
    double sum = 0;
    for (int64_t f = 0; f < c.frames; ++f) {
      const T* image = x.get() + ((row * c.frames + f) * c.inputs + o / outputs * inputs + channel) * pixels;
      const T* gradient = b.get() + ((row * c.frames + f) * c.outputs + o) * positions;
      for (int64_t p = 0; p < positions; ++p) {
        const Sizes position = at(p, grid);
        int64_t pixel = 0;
        bool inside = true;
        for (size_t a = 0; a < axes; ++a) {
          const int64_t where = position[a] * c.stride[a] + offset[a] * c.dilation[a] - c.padding[a];
          inside &= 0 <= where && where < c.image[a];
          pixel = pixel * c.image[a] + where;
        }
        if (inside) sum += double(image[pixel]) * double(gradient[p]);
      }
    }
    if (double(found[n]) != sum) {
      std::printf("element %ld is %g, expected %g\n", long(n), double(found[n]), sum);
      return false;
    }
  }
  return true;
}

// Walks over small images with whatever numbers, strides far beyond the image among them; the same ones every time.
void add_random(std::vector<Case>& cases, size_t count) {
  uint64_t state = 1;
  const auto below = [&](int64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return int64_t(state >> 33) % n;
  };
  while (cases.size() < count) {
    const int64_t strides[] = {1, 2, 3, 100'000};
    const int64_t groups = 1 + below(3), axes = 1 + below(2);
    Case c{1 + below(2), 1 + below(2), groups * (1 + below(2)), groups * (1 + below(2)), groups, {}, {}, {}, {}, {}};
    bool fits = true;
    for (int64_t a = 0; a < axes; ++a) {
      c.kernel.push_back(1 + below(3)), c.stride.push_back(strides[below(4)]), c.padding.push_back(below(4));
      c.dilation.push_back(1 + below(3)), c.image.push_back(1 + below(6));
      fits &= c.image[a] + 2 * c.padding[a] > c.dilation[a] * (c.kernel[a] - 1);
    }
    if (fits) cases.push_back(c);
  }
}

}  // namespace

int main() {
  std::vector<Case> cases{
      {2, 1, 3, 3, 3, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {5, 6}},
      {2, 2, 4, 6, 2, {3, 3}, {2, 2}, {1, 1}, {1, 1}, {9, 8}},
      {1, 1, 4, 4, 1, {7, 7}, {1, 1}, {3, 3}, {1, 1}, {11, 4}},
      {1, 3, 2, 2, 2, {3, 2}, {2, 3}, {2, 0}, {2, 3}, {12, 17}},
      {2, 1, 6, 3, 3, {2, 2}, {3, 4}, {0, 1}, {1, 1}, {10, 11}},
      {1, 1, 2, 2, 2, {1, 1}, {2, 3}, {0, 0}, {1, 1}, {3, 7}},
      {1, 1, 1, 2, 1, {5, 5}, {1, 1}, {4, 4}, {1, 1}, {1, 2}},
      {1, 1, 2, 2, 1, {3, 3}, {1, 1}, {1, 1}, {2, 2}, {47, 53}},  // more positions than are summed at once
      {3, 2, 4, 4, 4, {6}, {2}, {3}, {2}, {40}},
      {1, 1, 2, 4, 2, {2, 3, 2}, {1, 2, 1}, {1, 0, 1}, {1, 1, 2}, {4, 5, 6}},
  };
  add_random(cases, 400);
  for (size_t n = 0; n < cases.size(); ++n) {
    for (int64_t cut : {1, 3, 1000}) {
      if (!right<double>(cases[n], Element::Double, cut) || !right<float>(cases[n], Element::Float, cut)) {
        std::printf("case %zu, %ld parts at once\n", n, long(cut));
        return 1;
      }
    }
  }
  return 0;
}
