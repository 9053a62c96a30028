// The only file that knows torch and Python: checks arguments, registers kernels with the dispatcher, states build facts.
// It uses torch's stable ABI, so that one binary serves every torch from the target version on.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/direct.h"
#include "cpu/ghost.h"
#include "cpu/gram.h"
#include "cpu/gram_schmidt.h"
#include "cpu/grouped.h"
#include "cpu/project.h"
#ifdef MTU_FAST_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cuda/gram_schmidt.h"
#endif

#if defined(__clang__)
#define MTU_FAST_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define MTU_FAST_COMPILER "gcc " __VERSION__
#else
#define MTU_FAST_COMPILER "unknown"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_gram_schmidt(const Tensor& G, const Tensor& rhs, const Tensor& active) {
  STD_TORCH_CHECK(G.scalar_type() == ScalarType::Double && rhs.scalar_type() == ScalarType::Double,
                  "gram_schmidt: expected float64 G and rhs");
  STD_TORCH_CHECK(active.scalar_type() == ScalarType::Bool, "gram_schmidt: expected a bool mask of active rows");
  const int64_t dim = rhs.dim();
  STD_TORCH_CHECK(dim >= 1 && G.dim() == dim + 1, "gram_schmidt: expected G [..., R, R] and rhs [..., R], got ", G.dim(),
                  " and ", dim, " dimensions");
  for (int64_t i = 0; i < dim; ++i) {
    STD_TORCH_CHECK(G.size(i) == rhs.size(i), "gram_schmidt: G and rhs differ in dimension ", i, ": ", G.size(i), " and ",
                    rhs.size(i));
  }
  STD_TORCH_CHECK(G.size(dim) == G.size(dim - 1), "gram_schmidt: G is not square: ", G.size(dim - 1), " by ", G.size(dim));
  STD_TORCH_CHECK(active.dim() == 1 && active.size(0) == G.size(dim), "gram_schmidt: expected one active flag for each of ",
                  G.size(dim), " rows");
}

std::tuple<Tensor, Tensor> gram_schmidt(Tensor G, Tensor rhs, Tensor active, double tol) {
  STD_TORCH_CHECK(G.is_cpu() && rhs.is_cpu() && active.is_cpu(), "gram_schmidt: expected G, rhs and active on the CPU");
  check_gram_schmidt(G, rhs, active);
  G = torch::stable::contiguous(G);
  rhs = torch::stable::contiguous(rhs);
  active = torch::stable::contiguous(active);
  const auto shape = rhs.sizes();
  const int64_t R = shape[shape.size() - 1];
  int64_t problems = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) problems *= shape[i];

  Tensor x = torch::stable::new_empty(rhs, shape);
  Tensor rank = torch::stable::new_empty(rhs, shape.slice(0, shape.size() - 1), ScalarType::Long);

  const mtu_fast::cpu::GramSchmidt batch{R,
                                         G.const_data_ptr<double>(),
                                         rhs.const_data_ptr<double>(),
                                         active.const_data_ptr<bool>(),
                                         tol,
                                         x.mutable_data_ptr<double>(),
                                         rank.mutable_data_ptr<int64_t>()};
  const int64_t grain = std::max<int64_t>(1, 100'000 / (R * R * R / 6 + R * R + 1));  // about 50 us a thread
  torch::stable::parallel_for(0, problems, grain,
                              [&](int64_t begin, int64_t end) { mtu_fast::cpu::gram_schmidt(batch, begin, end); });
  return {x, rank};
}

std::tuple<Tensor, Tensor> basis(Tensor G, double tol) {
  STD_TORCH_CHECK(G.is_cpu() && G.scalar_type() == ScalarType::Double, "basis: expected float64 G on the CPU");
  STD_TORCH_CHECK(G.dim() >= 2 && G.size(G.dim() - 1) == G.size(G.dim() - 2), "basis: expected square G [..., K, K]");
  G = torch::stable::contiguous(G);
  const auto shape = G.sizes();
  const int64_t K = shape[shape.size() - 1];
  int64_t problems = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) problems *= shape[i];
  Tensor T = torch::stable::new_empty(G, shape);
  Tensor kept = torch::stable::new_empty(G, shape.slice(0, shape.size() - 1), ScalarType::Bool);
  const mtu_fast::cpu::Basis batch{K, G.const_data_ptr<double>(), tol, T.mutable_data_ptr<double>(),
                                   kept.mutable_data_ptr<bool>()};
  const int64_t grain = std::max<int64_t>(1, 100'000 / (K * K * K / 3 + K * K + 1));
  torch::stable::parallel_for(0, problems, grain,
                              [&](int64_t begin, int64_t end) { mtu_fast::cpu::basis(batch, begin, end); });
  return {T, kept};
}

std::optional<mtu_fast::cpu::Element> element(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return mtu_fast::cpu::Element::Double;
    case ScalarType::Float: return mtu_fast::cpu::Element::Float;
    case ScalarType::BFloat16: return mtu_fast::cpu::Element::BFloat16;
    case ScalarType::Half: return mtu_fast::cpu::Element::Half;
    default: return std::nullopt;
  }
}

// The rows of blocks [R_i, P], one after the other; blocks that a kernel cannot read are replaced.
std::vector<mtu_fast::cpu::Row> joined(const char* op, std::vector<Tensor>& blocks) {
  std::vector<mtu_fast::cpu::Row> rows;
  for (Tensor& t : blocks) {
    STD_TORCH_CHECK(t.is_cpu(), op, ": expected every block on the CPU");
    STD_TORCH_CHECK(t.dim() == 2, op, ": expected blocks [R_i, P], got ", t.dim(), " dimensions");
    STD_TORCH_CHECK(t.size(1) == blocks[0].size(1), op, ": expected blocks of one width, got ", blocks[0].size(1), " and ",
                    t.size(1));
    if (!element(t)) t = torch::stable::to(t, ScalarType::Double);
    if (t.size(1) > 1 && t.stride(1) != 1) t = torch::stable::contiguous(t);
    const auto* data = static_cast<const char*>(t.const_data_ptr());
    const int64_t step = t.stride(0) * t.element_size();
    for (int64_t r = 0; r < t.size(0); ++r) rows.push_back({data + r * step, *element(t)});
  }
  return rows;
}

int64_t chunks_at_once(int64_t work) { return std::max<int64_t>(1, 1'000'000 / (work + 1)); }  // about 50 us a thread

void write_gram(std::vector<mtu_fast::cpu::Row> rows, int64_t columns, int64_t known, double* out) {
  mtu_fast::cpu::RowGram gram(std::move(rows), columns, known);
  torch::stable::parallel_for(0, gram.chunks(), chunks_at_once(gram.work()),
                              [&](int64_t begin, int64_t end) { gram.sum(begin, end); });
  gram.write(out);
}

Tensor row_gram(std::vector<Tensor> blocks, int64_t known) {
  STD_TORCH_CHECK(!blocks.empty(), "row_gram: expected at least one block of rows");
  std::vector<mtu_fast::cpu::Row> rows = joined("row_gram", blocks);
  const int64_t R = rows.size();
  STD_TORCH_CHECK(0 <= known && known <= R, "row_gram: expected known from 0 to ", R, ", got ", known);
  Tensor out = torch::stable::new_empty(blocks[0], {R, R}, ScalarType::Double);
  write_gram(std::move(rows), blocks[0].size(1), known, out.mutable_data_ptr<double>());
  return out;
}

bool same(const Tensor& a, const Tensor& b) {
  const auto size = a.sizes(), other = b.sizes();
  const auto stride = a.strides(), step = b.strides();
  return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() &&
         std::equal(size.begin(), size.end(), other.begin(), other.end()) &&
         std::equal(stride.begin(), stride.end(), step.begin(), step.end());
}

// Which block each block is the same tensor as: the first of them.
std::vector<size_t> firsts(const std::vector<Tensor>& blocks) {
  std::vector<size_t> found;
  for (size_t i = 0; i < blocks.size(); ++i) {
    size_t first = 0;
    while (!same(blocks[first], blocks[i])) ++first;
    found.push_back(first);
  }
  return found;
}

// One side of rows left ⊗ right: its Gram, blocks that are one and the same tensor multiplied once.
mtu_fast::cpu::Factor factor(const std::vector<Tensor>& blocks) {
  const std::vector<size_t> first = firsts(blocks);
  std::vector<Tensor> distinct;
  std::vector<int64_t> starts(blocks.size());
  mtu_fast::cpu::Factor found;
  int64_t count = 0, R = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    starts[i] = first[i] == i ? count : starts[first[i]];
    found.blocks.push_back({R, starts[i], blocks[i].size(0)});
    R += blocks[i].size(0);
    if (first[i] != i) continue;
    count += blocks[i].size(0);
    distinct.push_back(blocks[i]);
  }
  found.gram.resize(count * count);
  write_gram(joined("rank_one_gram", distinct), distinct[0].size(1), 0, found.gram.data());
  found.rows = count;
  return found;
}

// For each side the first one that has the same blocks.
std::vector<size_t> first_sides(const std::vector<std::vector<Tensor>>& sides) {
  std::unordered_multimap<const void*, size_t> seen;  // by where a side begins
  std::vector<size_t> found;
  for (size_t i = 0; i < sides.size(); ++i) {
    const void* begin = sides[i][0].const_data_ptr();
    const auto [from, to] = seen.equal_range(begin);
    const auto alike = std::find_if(from, to, [&](const auto& other) {
      return std::equal(sides[i].begin(), sides[i].end(), sides[other.second].begin(), same);
    });
    found.push_back(alike == to ? i : alike->second);
    if (alike == to) seen.emplace(begin, i);
  }
  return found;
}

Tensor rank_one_gram(std::vector<Tensor> left, std::vector<Tensor> right, int64_t parameters) {
  const int64_t all = left.size();
  STD_TORCH_CHECK(parameters > 0 && all > 0 && all % parameters == 0 && right.size() == left.size(),
                  "rank_one_gram: expected as many blocks on both sides and for each of ", parameters,
                  " parameters, one at least, got ", all, " and ", right.size());
  const int64_t blocks = all / parameters;
  int64_t R = 0;
  for (int64_t i = 0; i < all; ++i) {
    const int64_t rows = left[i % blocks].size(0);
    STD_TORCH_CHECK(left[i].size(0) == rows && right[i].size(0) == rows, "rank_one_gram: block ", i, " has ",
                    left[i].size(0), " and ", right[i].size(0), " rows, expected ", rows, " as for the first parameter");
    if (i < blocks) R += rows;
  }
  std::vector<std::vector<Tensor>> sides;  // left and right of every parameter in turn
  for (int64_t j = 0; j < all; j += blocks) {
    for (const auto* t : {&left, &right}) sides.emplace_back(t->begin() + j, t->begin() + j + blocks);
  }
  const std::vector<size_t> first = first_sides(sides);
  std::vector<mtu_fast::cpu::Factor> factors(sides.size());
  std::vector<size_t> last(sides.size());
  for (size_t i = 0; i < sides.size(); ++i) last[first[i]] = i;
  Tensor out = torch::stable::new_zeros(left[0], {R, R}, ScalarType::Double);
  double* const sums = out.mutable_data_ptr<double>();
  for (size_t i = 0; i < sides.size(); i += 2) {
    for (size_t k : {i, i + 1}) {
      if (first[k] == k) factors[k] = factor(sides[k]);
    }
    const auto &a = factors[first[i]], &b = factors[first[i + 1]];
    torch::stable::parallel_for(0, R, chunks_at_once(R), [&](int64_t begin, int64_t end) {
      mtu_fast::cpu::add_hadamard(a, b, R, begin, end, sums);
    });
    for (size_t k : {first[i], first[i + 1]}) {
      if (last[k] <= i + 1) factors[k] = {};
    }
  }
  return out;
}

// Rows along the last dimension; t is made contiguous along it if it is not.
mtu_fast::cpu::Rows rows_of(const char* op, Tensor& t, int64_t batch = 0) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": expected every tensor on the CPU");
  STD_TORCH_CHECK(element(t), op, ": expected float64, float32, bfloat16 or float16");
  const int64_t dim = t.dim();
  if (t.size(dim - 1) > 1 && t.stride(dim - 1) != 1) t = torch::stable::contiguous(t);
  auto* data = const_cast<char*>(static_cast<const char*>(t.const_data_ptr()));
  const int64_t offset = dim == 3 ? batch * t.stride(0) * t.element_size() : 0;
  return {data + offset, t.stride(dim - 2) * static_cast<int64_t>(t.element_size()), *element(t)};
}

std::vector<Tensor> project(std::vector<Tensor> g, std::vector<Tensor> Q, bool into) {
  STD_TORCH_CHECK(!g.empty() && g.size() == Q.size(), "project: expected as many g as Q, at least one, got ", g.size(),
                  " and ", Q.size());
  std::vector<Tensor> out;
  std::vector<mtu_fast::cpu::Piece> pieces;
  for (size_t l = 0; l < g.size(); ++l) {
    STD_TORCH_CHECK(g[l].dim() == 2 && Q[l].dim() == 2, "project: expected g [M, P_l] and Q [K, P_l], got ", g[l].dim(),
                    " and ", Q[l].dim(), " dimensions");
    STD_TORCH_CHECK(g[l].size(1) == Q[l].size(1), "project: g and Q differ in width: ", g[l].size(1), " and ", Q[l].size(1));
    STD_TORCH_CHECK(g[l].size(0) == g[0].size(0) && Q[l].size(0) == Q[0].size(0),
                    "project: expected the same numbers of vectors and of rows for every parameter");
    out.push_back(torch::stable::new_empty(g[l], g[l].sizes()));
    pieces.push_back({rows_of("project", Q[l]), rows_of("project", g[l]), rows_of("project", out[l]), g[l].size(1), nullptr});
  }
  mtu_fast::cpu::Projection projection(std::move(pieces), Q[0].size(0), g[0].size(0));
  const int64_t grain = std::max<int64_t>(1, 500'000 / (projection.work() + 1));  // about 50 us a thread
  torch::stable::parallel_for(0, projection.chunks(), grain,
                              [&](int64_t begin, int64_t end) { projection.sum(begin, end); });
  projection.weigh(into);
  torch::stable::parallel_for(0, projection.chunks(), grain,
                              [&](int64_t begin, int64_t end) { projection.expand(begin, end); });
  return out;
}

std::vector<Tensor> transform(std::vector<Tensor> rows, Tensor T) {
  STD_TORCH_CHECK(T.is_cpu() && T.scalar_type() == ScalarType::Double, "transform: expected float64 T on the CPU");
  const int64_t dim = T.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && T.size(dim - 1) == T.size(dim - 2), "transform: expected T [K, K] or [B, K, K]");
  const int64_t K = T.size(dim - 1);
  T = torch::stable::contiguous(T);
  std::vector<Tensor> out;
  std::vector<mtu_fast::cpu::Piece> pieces;
  for (Tensor& t : rows) {
    STD_TORCH_CHECK(t.dim() == dim && t.size(dim - 2) == K && t.size(0) == T.size(0),
                    "transform: expected rows [K, P_l] to go with T [K, K], or [B, K, P_l] with [B, K, K]");
    Tensor result = torch::stable::new_empty(t, t.sizes());
    for (int64_t b = 0; b < (dim == 3 ? t.size(0) : 1); ++b) {
      const auto from = rows_of("transform", t, b), to = rows_of("transform", result, b);
      pieces.push_back({from, {nullptr, 0, from.element}, to, t.size(dim - 1), T.const_data_ptr<double>() + b * K * K});
    }
    out.push_back(result);
  }
  mtu_fast::cpu::Projection projection(std::move(pieces), K, K);
  const int64_t grain = std::max<int64_t>(1, 1'000'000 / (projection.work() + 1));
  torch::stable::parallel_for(0, projection.chunks(), grain,
                              [&](int64_t begin, int64_t end) { projection.expand(begin, end); });
  return out;
}

mtu_fast::cpu::Block block(Tensor& t) {
  if (!element(t)) t = torch::stable::to(t, ScalarType::Double);
  const auto size = t.sizes(), stride = t.strides();
  return {t.const_data_ptr(), *element(t), {size.begin(), size.end()}, {stride.begin(), stride.end()}};
}

void check_sides(const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& b, int64_t axes) {
  STD_TORCH_CHECK(!x.empty() && x.size() == b.size(), op, ": expected as many blocks on both sides, one at least, got ",
                  x.size(), " and ", b.size());
  for (size_t i = 0; i < x.size(); ++i) {
    STD_TORCH_CHECK(x[i].is_cpu() && b[i].is_cpu(), op, ": expected every block on the CPU");
    STD_TORCH_CHECK(x[i].dim() == 3 + axes && b[i].dim() == 3 + axes, op, ": expected blocks of ", 3 + axes,
                    " dimensions, got ", x[i].dim(), " and ", b[i].dim());
    STD_TORCH_CHECK(x[i].size(0) == b[i].size(0) && x[i].size(1) == b[i].size(1), op, ": the sides of block ", i,
                    " differ: ", x[i].size(0), " by ", x[i].size(1), " and ", b[i].size(0), " by ", b[i].size(1));
    STD_TORCH_CHECK(x[i].size(2) == x[0].size(2) && b[i].size(2) == b[0].size(2), op,
                    ": expected blocks of one width, got ", x[0].size(2), " by ", b[0].size(2), " and ", x[i].size(2),
                    " by ", b[i].size(2));
  }
}

Tensor ghost(std::vector<Tensor>& x, std::vector<Tensor>& b, const mtu_fast::cpu::Walk& walk) {
  const std::vector<size_t> first = firsts(x);
  std::vector<mtu_fast::cpu::Ghost::Family> families;
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
  mtu_fast::cpu::Ghost gram(std::move(families), walk);
  torch::stable::parallel_for(0, gram.panels(), 64, [&](int64_t begin, int64_t end) { gram.widen(begin, end); });
  torch::stable::parallel_for(0, gram.pairs(), chunks_at_once(gram.work()),
                              [&](int64_t begin, int64_t end) { gram.multiply(begin, end); });
  gram.write(out.mutable_data_ptr<double>(), R);
  return out;
}

Tensor direct(std::vector<Tensor>& x, std::vector<Tensor>& b, const mtu_fast::cpu::Walk& walk) {
  std::vector<mtu_fast::cpu::Block> images, gradients;
  std::vector<mtu_fast::cpu::Direct::Pair> pairs(x.size());
  int64_t R = 0;
  const auto gather = [&](std::vector<Tensor>& side, std::vector<mtu_fast::cpu::Block>& blocks, auto which) {
    const std::vector<size_t> first = firsts(side);
    for (size_t i = 0; i < side.size(); ++i) {
      pairs[i].*which = first[i] == i ? blocks.size() : pairs[first[i]].*which;
      if (first[i] == i) blocks.push_back(block(side[i]));
    }
  };
  gather(x, images, &mtu_fast::cpu::Direct::Pair::x);
  gather(b, gradients, &mtu_fast::cpu::Direct::Pair::b);
  for (const Tensor& t : x) R += t.size(0);
  Tensor out = torch::stable::new_empty(x[0], {R, R}, ScalarType::Double);
  mtu_fast::cpu::Direct gram(images, gradients, pairs, walk);
  const auto grain = [](int64_t most, int64_t work) { return std::max<int64_t>(1, most / (work + 1)); };  // about 50 us
  torch::stable::parallel_for(0, gram.wide_rows(), grain(100'000, gram.width()),
                              [&](int64_t begin, int64_t end) { gram.pack(begin, end); });
  torch::stable::parallel_for(0, gram.slots(), grain(1'000'000, gram.work()),
                              [&](int64_t begin, int64_t end) { gram.sum(begin, end); });
  gram.write(out.mutable_data_ptr<double>());
  return out;
}

// `precision` is a permission; these kernels are at its highest always.
Tensor outer_direct(std::vector<Tensor> left, std::vector<Tensor> right, std::string) {
  check_sides("outer_direct", left, right, 0);
  return direct(left, right, {});
}

Tensor outer_ghost(std::vector<Tensor> left, std::vector<Tensor> right, std::string) {
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
                  const mtu_fast::cpu::Walk& walk) {
  const auto& [kernel, stride, padding, dilation] = walk;
  const size_t axes = kernel.size();
  STD_TORCH_CHECK(stride.size() == axes && padding.size() == axes && dilation.size() == axes, op,
                  ": kernel, stride, padding and dilation differ in length: ", axes, ", ", stride.size(), ", ",
                  padding.size(), " and ", dilation.size());
  check_sides(op, x, b, axes);
  for (size_t a = 0; a < axes; ++a) {
    STD_TORCH_CHECK(kernel[a] > 0 && stride[a] > 0 && padding[a] >= 0 && dilation[a] > 0, op,
                    ": expected positive kernel, stride and dilation and no negative padding, got ", kernel[a], ", ",
                    stride[a], ", ", dilation[a], " and ", padding[a], " along axis ", a);
    for (size_t i = 0; i < x.size(); ++i) {
      const int64_t room = x[i].size(3 + a) + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1;
      const int64_t expected = room < 0 ? 0 : room / stride[a] + 1;
      STD_TORCH_CHECK(b[i].size(3 + a) == expected, op, ": block ", i, " has ", b[i].size(3 + a),
                      " output positions along axis ", a, ", expected ", expected);
    }
  }
}

Tensor conv_direct(std::vector<Tensor> x, std::vector<Tensor> b, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                   std::vector<int64_t> padding, std::vector<int64_t> dilation, std::string) {
  const mtu_fast::cpu::Walk walk{std::move(kernel), std::move(stride), std::move(padding), std::move(dilation)};
  check_images("conv_direct", x, b, walk);
  return direct(x, b, walk);
}

Tensor conv_ghost(std::vector<Tensor> x, std::vector<Tensor> b, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, std::string) {
  const mtu_fast::cpu::Walk walk{std::move(kernel), std::move(stride), std::move(padding), std::move(dilation)};
  check_images("conv_ghost", x, b, walk);
  return ghost(x, b, walk);
}

Tensor grouped_rows(Tensor x, Tensor b, int64_t groups, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const mtu_fast::cpu::Walk walk{std::move(kernel), std::move(stride), std::move(padding), std::move(dilation)};
  check_images("grouped_rows", {x}, {b}, walk);
  STD_TORCH_CHECK(!walk.kernel.empty(), "grouped_rows: expected an axis at least");
  STD_TORCH_CHECK(groups > 0 && x.size(2) % groups == 0 && b.size(2) % groups == 0, "grouped_rows: ", groups,
                  " groups do not divide ", x.size(2), " and ", b.size(2), " channels");
  std::vector<int64_t> shape{x.size(0), b.size(2), x.size(2) / groups};
  shape.insert(shape.end(), walk.kernel.begin(), walk.kernel.end());
  const mtu_fast::cpu::Grouped rows(block(x), block(b), groups, walk);
  Tensor out = torch::stable::new_zeros(b, shape, rows.is_double() ? ScalarType::Double : ScalarType::Float);
  if (b.numel() == 0) return out;
  void* const data = out.mutable_data_ptr();
  torch::stable::parallel_for(0, rows.parts(), chunks_at_once(rows.work()),
                              [&](int64_t begin, int64_t end) { rows.form(begin, end, data); });
  return out;
}

#ifdef MTU_FAST_CUDA

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
  return stream;
}

int64_t words_for(const char* op, int64_t problems, int64_t rows) {
  int64_t words = 0;
  const std::string error = mtu_fast::cuda::workspace(problems, rows, words);
  STD_TORCH_CHECK(error.empty(), op, ": CUDA reports ", error);
  STD_TORCH_CHECK(words >= 0, op, ": ", rows, " rows are more than this device's shared memory serves (about 4000). ",
                  "Move G to the CPU, or take fewer rows at once");
  return words;
}

std::tuple<Tensor, Tensor> gram_schmidt_cuda(Tensor G, Tensor rhs, Tensor active, double tol) {
  STD_TORCH_CHECK(G.is_cuda() && rhs.is_cuda() && active.is_cuda() && G.get_device() == rhs.get_device() &&
                      G.get_device() == active.get_device(),
                  "gram_schmidt: expected G, rhs and active on one CUDA device");
  check_gram_schmidt(G, rhs, active);
  const torch::stable::accelerator::DeviceGuard guard(G.get_device());
  G = torch::stable::contiguous(G);
  rhs = torch::stable::contiguous(rhs);
  active = torch::stable::contiguous(active);
  const auto shape = rhs.sizes();
  const int64_t R = shape[shape.size() - 1];
  Tensor x = torch::stable::new_empty(rhs, shape);
  Tensor rank = torch::stable::new_empty(rhs, shape.slice(0, shape.size() - 1), ScalarType::Long);
  const int64_t problems = rank.numel();
  Tensor workspace = torch::stable::new_empty(rhs, {words_for("gram_schmidt", problems, R)});
  mtu_fast::cuda::GramSchmidt batch{problems, R, G.const_data_ptr<double>(), tol};
  batch.rhs = rhs.const_data_ptr<double>();
  batch.active = active.const_data_ptr<bool>();
  batch.x = x.mutable_data_ptr<double>();
  batch.rank = rank.mutable_data_ptr<int64_t>();
  batch.workspace = workspace.mutable_data_ptr<double>();
  const std::string error = mtu_fast::cuda::solve(batch, current_stream(G));
  STD_TORCH_CHECK(error.empty(), "gram_schmidt: CUDA reports ", error);
  return {x, rank};
}

std::tuple<Tensor, Tensor> basis_cuda(Tensor G, double tol) {
  const int64_t dim = G.dim();
  STD_TORCH_CHECK(G.is_cuda(), "basis: expected G on a CUDA device");
  STD_TORCH_CHECK(G.scalar_type() == ScalarType::Double, "basis: expected float64 G");
  STD_TORCH_CHECK(dim >= 2 && G.size(dim - 1) == G.size(dim - 2), "basis: expected square G [..., K, K]");
  const torch::stable::accelerator::DeviceGuard guard(G.get_device());
  G = torch::stable::contiguous(G);
  const auto shape = G.sizes();
  const int64_t K = G.size(dim - 1);
  Tensor T = torch::stable::new_empty(G, shape);
  Tensor kept = torch::stable::new_empty(G, shape.slice(0, dim - 1), ScalarType::Bool);
  int64_t problems = 1;
  for (int64_t i = 0; i + 2 < dim; ++i) problems *= shape[i];
  words_for("basis", problems, K);
  mtu_fast::cuda::GramSchmidt batch{problems, K, G.const_data_ptr<double>(), tol};
  batch.inverse = T.mutable_data_ptr<double>();
  batch.kept = kept.mutable_data_ptr<bool>();
  const std::string error = mtu_fast::cuda::basis(batch, current_stream(G));
  STD_TORCH_CHECK(error.empty(), "basis: CUDA reports ", error);
  return {T, kept};
}

#endif

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["compiler"] = MTU_FAST_COMPILER;
  facts["flags"] = MTU_FAST_FLAGS;
  facts["torch (headers)"] = TORCH_VERSION;
  facts["torch (oldest served)"] = MTU_FAST_TORCH_TARGET;
#ifdef MTU_FAST_CUDA
  facts["cuda"] = MTU_FAST_CUDA;
#else
  facts["cuda"] = MTU_FAST_NO_CUDA;
#endif
  return facts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtu_fast, CPU, m) {
  m.impl("basis", TORCH_BOX(&basis));
  m.impl("conv_direct", TORCH_BOX(&conv_direct));
  m.impl("conv_ghost", TORCH_BOX(&conv_ghost));
  m.impl("gram_schmidt", TORCH_BOX(&gram_schmidt));
  m.impl("grouped_rows", TORCH_BOX(&grouped_rows));
  m.impl("outer_direct", TORCH_BOX(&outer_direct));
  m.impl("outer_ghost", TORCH_BOX(&outer_ghost));
  m.impl("project", TORCH_BOX(&project));
  m.impl("rank_one_gram", TORCH_BOX(&rank_one_gram));
  m.impl("row_gram", TORCH_BOX(&row_gram));
  m.impl("transform", TORCH_BOX(&transform));
}

#ifdef MTU_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(mtu_fast, CUDA, m) {
  m.impl("basis", TORCH_BOX(&basis_cuda));
  m.impl("gram_schmidt", TORCH_BOX(&gram_schmidt_cuda));
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of mtu_fast; importing this module registers them with torch's dispatcher.";
  m.def("build_facts", &build_facts, "How this binary was built.");
}
