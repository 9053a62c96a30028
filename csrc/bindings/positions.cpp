// Sums over positions: Grams of outer products and of convolutions, by either route, and rows of convolutions.

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/direct.h"
#include "../cpu/ghost.h"
#include "../cpu/grouped.h"
#include "arguments.h"
#include "tensors.h"

namespace mtu_fast {
namespace {

void check_sides(const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& b, int64_t axes) {
  STD_TORCH_CHECK(!x.empty() && x.size() == b.size(), op, ": expected as many blocks on both sides, one at least, got ",
                  x.size(), " and ", b.size());
  check_floats(op, axes > 0 ? "x" : "left", x);
  check_floats(op, axes > 0 ? "b" : "right", b);
  for (size_t i = 0; i < x.size(); ++i) {
    STD_TORCH_CHECK(x[i].dim() == 3 + axes && b[i].dim() == 3 + axes, op, ": expected blocks of ", 3 + axes,
                    " dimensions, got ", x[i].dim(), " and ", b[i].dim());
    STD_TORCH_CHECK(x[i].size(0) == b[i].size(0) && x[i].size(1) == b[i].size(1), op, ": the sides of block ", i,
                    " differ: ", x[i].size(0), " by ", x[i].size(1), " and ", b[i].size(0), " by ", b[i].size(1));
    STD_TORCH_CHECK(x[i].size(2) == x[0].size(2) && b[i].size(2) == b[0].size(2), op,
                    ": expected blocks of one width, got ", x[0].size(2), " by ", b[0].size(2), " and ", x[i].size(2),
                    " by ", b[i].size(2));
  }
}

Tensor ghost(std::vector<Tensor>& x, std::vector<Tensor>& b, const cpu::Walk& walk) {
  const std::vector<size_t> first = firsts(x);
  std::vector<cpu::Ghost::Family> families;
  std::vector<size_t> family(x.size());
  int64_t R = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    family[i] = first[i] == i ? families.size() : family[first[i]];  // one x has outputs of one size, as was checked
    if (first[i] == i) families.push_back({block(x[i]), {}, {}});
    families[family[i]].b.push_back(block(b[i]));
    families[family[i]].start.push_back(R);
    R += x[i].size(0);
  }
  Tensor out = torch::stable::new_empty(x[0], {R, R}, ScalarType::Double);
  cpu::Ghost gram(std::move(families), walk);
  torch::stable::parallel_for(0, gram.panels(), 64, [&](int64_t begin, int64_t end) { gram.widen(begin, end); });
  torch::stable::parallel_for(0, gram.pairs(), chunks_at_once(gram.work()),
                              [&](int64_t begin, int64_t end) { gram.multiply(begin, end); });
  gram.write(out.mutable_data_ptr<double>(), R);
  return out;
}

// The rows of G: as many as `into` names, each at least once, or all.
int64_t rows_of_gram(const char* op, const std::vector<Tensor>& x, const std::vector<int64_t>& into) {
  int64_t all = 0;
  for (const Tensor& t : x) all += t.size(0);
  if (into.empty()) return all;
  STD_TORCH_CHECK(static_cast<int64_t>(into.size()) == all, op, ": into: expected a row of the Gram for each of ", all,
                  " rows, got ", into.size());
  std::vector<bool> named(all, false);
  int64_t R = 0;
  for (int64_t row : into) {
    STD_TORCH_CHECK(-1 <= row && row < all, op, ": into: expected rows from 0 to ", all - 1, ", or -1, got ", row);
    if (row < 0) continue;
    named[row] = true;
    R = std::max(R, row + 1);
  }
  STD_TORCH_CHECK(std::count(named.begin(), named.end(), true) == R, op, ": into: expected every row of the Gram below ",
                  R, " at least once");
  return R;
}

Tensor direct(const char* op, std::vector<Tensor>& x, std::vector<Tensor>& b, const cpu::Walk& walk,
              const std::vector<int64_t>& into) {
  const int64_t R = rows_of_gram(op, x, into);
  std::vector<cpu::Block> images, gradients;
  std::vector<cpu::Direct::Pair> pairs(x.size());
  const auto gather = [&](std::vector<Tensor>& side, std::vector<cpu::Block>& blocks, auto which) {
    const std::vector<size_t> first = firsts(side);
    for (size_t i = 0; i < side.size(); ++i) {
      pairs[i].*which = first[i] == i ? blocks.size() : pairs[first[i]].*which;
      if (first[i] == i) blocks.push_back(block(side[i]));
    }
  };
  gather(x, images, &cpu::Direct::Pair::x);
  gather(b, gradients, &cpu::Direct::Pair::b);
  Tensor out = torch::stable::new_empty(x[0], {R, R}, ScalarType::Double);
  cpu::Direct gram(images, gradients, pairs, walk, into);
  const auto grain = [](int64_t most, int64_t work) { return std::max<int64_t>(1, most / (work + 1)); };  // about 50 us
  torch::stable::parallel_for(0, gram.wide_rows(), grain(100'000, gram.width()),
                              [&](int64_t begin, int64_t end) { gram.pack(begin, end); });
  torch::stable::parallel_for(0, gram.slots(), grain(1'000'000, gram.work()),
                              [&](int64_t begin, int64_t end) { gram.sum(begin, end); });
  gram.write(out.mutable_data_ptr<double>());
  return out;
}

// `precision` is a permission; these kernels are at its highest always.
Tensor outer_direct(std::vector<Tensor> left, std::vector<Tensor> right, std::string precision,
                    std::vector<int64_t> into) {
  check_precision("outer_direct", precision);
  check_sides("outer_direct", left, right, 0);
  return direct("outer_direct", left, right, {}, into);
}

Tensor outer_ghost(std::vector<Tensor> left, std::vector<Tensor> right, std::string precision) {
  check_precision("outer_ghost", precision);
  check_sides("outer_ghost", left, right, 0);
  const auto distinct = [](const std::vector<Tensor>& blocks) {
    const std::vector<size_t> first = firsts(blocks);
    int64_t count = 0;
    for (size_t i = 0; i < first.size(); ++i) count += first[i] == i;
    return count;
  };
  if (distinct(right) < distinct(left)) std::swap(left, right);
  return ghost(left, right, {});
}

void check_images(const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& b,
                  const cpu::Walk& walk) {
  check_walk(op, walk);
  check_sides(op, x, b, walk.kernel.size());
  for (size_t i = 0; i < x.size(); ++i) check_grid(op, i, x[i], b[i], walk);
}

void check_tables(const char* op, const std::vector<Tensor>& b, const cpu::Walk& walk, bool by_lines) {
  for (const Tensor& t : b) check_table(op, t, walk, by_lines);
}

Tensor conv_direct(std::vector<Tensor> x, std::vector<Tensor> b, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                   std::vector<int64_t> padding, std::vector<int64_t> dilation, std::string precision,
                   std::vector<int64_t> into) {
  check_precision("conv_direct", precision);
  const cpu::Walk walk{std::move(kernel), std::move(stride), std::move(padding), std::move(dilation)};
  check_images("conv_direct", x, b, walk);
  check_tables("conv_direct", b, walk, true);
  return direct("conv_direct", x, b, walk, into);
}

Tensor conv_ghost(std::vector<Tensor> x, std::vector<Tensor> b, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, std::string precision) {
  check_precision("conv_ghost", precision);
  const cpu::Walk walk{std::move(kernel), std::move(stride), std::move(padding), std::move(dilation)};
  check_images("conv_ghost", x, b, walk);
  check_tables("conv_ghost", b, walk, false);
  return ghost(x, b, walk);
}

Tensor grouped_rows(Tensor x, Tensor b, int64_t groups, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const cpu::Walk walk{std::move(kernel), std::move(stride), std::move(padding), std::move(dilation)};
  check_images("grouped_rows", {x}, {b}, walk);
  STD_TORCH_CHECK(!walk.kernel.empty(), "grouped_rows: expected an axis at least");
  STD_TORCH_CHECK(groups > 0 && x.size(2) % groups == 0 && b.size(2) % groups == 0, "grouped_rows: ", groups,
                  " groups do not divide ", x.size(2), " and ", b.size(2), " channels");
  std::vector<int64_t> shape{x.size(0), b.size(2), x.size(2) / groups};
  shape.insert(shape.end(), walk.kernel.begin(), walk.kernel.end());
  STD_TORCH_CHECK(product(shape) <= MOST_ELEMENTS, "grouped_rows: kernel: rows of more than 2**40 elements");
  const cpu::Grouped rows(block(x), block(b), groups, walk);
  Tensor out = torch::stable::new_zeros(b, shape, rows.is_double() ? ScalarType::Double : ScalarType::Float);
  if (b.numel() == 0) return out;
  void* const data = out.mutable_data_ptr();
  torch::stable::parallel_for(0, rows.parts(), chunks_at_once(rows.work()),
                              [&](int64_t begin, int64_t end) { rows.form(begin, end, data); });
  return out;
}

}  // namespace
}  // namespace mtu_fast

STABLE_TORCH_LIBRARY_IMPL(mtu_fast, CPU, m) {
  m.impl("conv_direct", TORCH_BOX(&mtu_fast::conv_direct));
  m.impl("conv_ghost", TORCH_BOX(&mtu_fast::conv_ghost));
  m.impl("grouped_rows", TORCH_BOX(&mtu_fast::grouped_rows));
  m.impl("outer_direct", TORCH_BOX(&mtu_fast::outer_direct));
  m.impl("outer_ghost", TORCH_BOX(&mtu_fast::outer_ghost));
}
