// Grams of explicit rows, and of rows that are outer products of one position.

#include <algorithm>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../cpu/gram.h"
#include "arguments.h"
#include "tensors.h"

namespace mtu_fast {
namespace {

// The rows of blocks [R_i, P], one after the other.
std::vector<cpu::Row> joined(const char* op, std::vector<Tensor>& blocks) {
  std::vector<cpu::Row> rows;
  for (Tensor& t : blocks) {
    STD_TORCH_CHECK(t.dim() == 2, op, ": expected blocks [R_i, P], got ", t.dim(), " dimensions");
    STD_TORCH_CHECK(t.size(1) == blocks[0].size(1), op, ": expected blocks of one width, got ", blocks[0].size(1), " and ",
                    t.size(1));
    if (t.size(1) > 1 && t.stride(1) != 1) t = torch::stable::contiguous(t);
    const auto* data = static_cast<const char*>(t.const_data_ptr());
    const int64_t step = t.stride(0) * t.element_size();
    for (int64_t r = 0; r < t.size(0); ++r) rows.push_back({data + r * step, *element(t)});
  }
  return rows;
}

void write_gram(std::vector<cpu::Row> rows, int64_t columns, int64_t known, double* out) {
  cpu::RowGram gram(std::move(rows), columns, known);
  torch::stable::parallel_for(0, gram.chunks(), chunks_at_once(gram.work()),
                              [&](int64_t begin, int64_t end) { gram.sum(begin, end); });
  gram.write(out);
}

Tensor row_gram(std::vector<Tensor> blocks, int64_t known) {
  STD_TORCH_CHECK(!blocks.empty(), "row_gram: expected at least one block of rows");
  check_floats("row_gram", "rows", blocks);
  std::vector<cpu::Row> rows = joined("row_gram", blocks);
  const int64_t R = rows.size();
  STD_TORCH_CHECK(0 <= known && known <= R, "row_gram: expected known from 0 to ", R, ", got ", known);
  Tensor out = torch::stable::new_empty(blocks[0], {R, R}, ScalarType::Double);
  write_gram(std::move(rows), blocks[0].size(1), known, out.mutable_data_ptr<double>());
  return out;
}

// One side of rows left ⊗ right: its Gram, blocks that are one and the same tensor multiplied once; of blocks behind the
// first `fresh` rows no products with one another.
cpu::Factor factor(const std::vector<Tensor>& blocks, int64_t fresh) {
  const std::vector<size_t> first = firsts(blocks);
  std::vector<Tensor> distinct;
  std::vector<int64_t> starts(blocks.size());
  cpu::Factor found;
  int64_t count = 0, known = 0, R = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    starts[i] = first[i] == i ? count : starts[first[i]];
    found.blocks.push_back({R, starts[i], blocks[i].size(0)});
    const bool is_known = R >= fresh;
    R += blocks[i].size(0);
    if (first[i] != i) continue;
    count += blocks[i].size(0);
    if (is_known) known += blocks[i].size(0);
    distinct.push_back(blocks[i]);
  }
  found.gram.resize(count * count);
  write_gram(joined("rank_one_gram", distinct), distinct[0].size(1), known, found.gram.data());
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

Tensor rank_one_gram(std::vector<Tensor> left, std::vector<Tensor> right, int64_t parameters, int64_t known) {
  const int64_t all = left.size();
  STD_TORCH_CHECK(parameters > 0 && all > 0 && all % parameters == 0 && right.size() == left.size(),
                  "rank_one_gram: expected as many blocks on both sides and for each of ", parameters,
                  " parameters, one at least, got ", all, " and ", right.size());
  const int64_t blocks = all / parameters;
  int64_t R = 0;
  for (int64_t i = 0; i < all; ++i) {
    check_floats("rank_one_gram", "left", left[i]);
    check_floats("rank_one_gram", "right", right[i]);
    STD_TORCH_CHECK(left[i].dim() == 2 && right[i].dim() == 2, "rank_one_gram: expected blocks [R_i, width], got ",
                    left[i].dim(), " and ", right[i].dim(), " dimensions");
    const int64_t rows = left[i % blocks].size(0);
    STD_TORCH_CHECK(left[i].size(0) == rows && right[i].size(0) == rows, "rank_one_gram: block ", i, " has ",
                    left[i].size(0), " and ", right[i].size(0), " rows, expected ", rows, " as for the first parameter");
    if (i < blocks) R += rows;
  }
  STD_TORCH_CHECK(static_cast<double>(R) * R <= MOST_ELEMENTS, "rank_one_gram: left: expected at most 2**20 rows, got ", R);
  STD_TORCH_CHECK(0 <= known && known <= R, "rank_one_gram: expected known from 0 to ", R, ", got ", known);
  const int64_t fresh = R - known;
  std::vector<std::vector<Tensor>> sides;  // left and right of every parameter in turn
  for (int64_t j = 0; j < all; j += blocks) {
    for (const auto* t : {&left, &right}) sides.emplace_back(t->begin() + j, t->begin() + j + blocks);
  }
  const std::vector<size_t> first = first_sides(sides);
  std::vector<cpu::Factor> factors(sides.size());
  std::vector<size_t> last(sides.size());
  for (size_t i = 0; i < sides.size(); ++i) last[first[i]] = i;
  Tensor out = torch::stable::new_zeros(left[0], {R, R}, ScalarType::Double);
  double* const sums = out.mutable_data_ptr<double>();
  for (size_t i = 0; i < sides.size(); i += 2) {
    for (size_t k : {i, i + 1}) {
      if (first[k] == k) factors[k] = factor(sides[k], fresh);
    }
    const auto &a = factors[first[i]], &b = factors[first[i + 1]];
    torch::stable::parallel_for(0, R, chunks_at_once(R), [&](int64_t begin, int64_t end) {
      cpu::add_hadamard(a, b, R, begin, end, sums);
    });
    for (size_t k : {first[i], first[i + 1]}) {
      if (last[k] <= i + 1) factors[k] = {};
    }
  }
  // of blocks that only in part are known
  for (int64_t r = fresh; r < R; ++r) std::fill(sums + r * R + fresh, sums + (r + 1) * R, 0.0);
  return out;
}

}  // namespace
}  // namespace mtu_fast

STABLE_TORCH_LIBRARY_IMPL(mtu_fast, CPU, m) {
  m.impl("rank_one_gram", TORCH_BOX(&mtu_fast::rank_one_gram));
  m.impl("row_gram", TORCH_BOX(&mtu_fast::row_gram));
}
