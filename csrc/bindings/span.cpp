// Gram-Schmidt and projection.

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/gram_schmidt.h"
#include "../cpu/project.h"
#include "arguments.h"
#include "tensors.h"
#ifdef MTU_FAST_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../cuda/gram_schmidt.h"
#endif

namespace mtu_fast {
namespace {

void check_tolerance(const char* op, double tol) {
  STD_TORCH_CHECK(0 < tol && tol < 1, op, ": tol is ", tol, ", expected a length between 0 and 1");
}

void check_gram_schmidt(const Tensor& G, const Tensor& rhs, const Tensor& active) {
  STD_TORCH_CHECK(G.scalar_type() == ScalarType::Double && rhs.scalar_type() == ScalarType::Double,
                  "gram_schmidt: expected float64 G and rhs");
  STD_TORCH_CHECK(active.scalar_type() == ScalarType::Bool, "gram_schmidt: expected a bool mask of active rows");
  check_size("gram_schmidt", "G", G);
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
  check_tolerance("gram_schmidt", tol);
  G = torch::stable::contiguous(G);
  rhs = torch::stable::contiguous(rhs);
  active = torch::stable::contiguous(active);
  const auto shape = rhs.sizes();
  const int64_t R = shape[shape.size() - 1];
  int64_t problems = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) problems *= shape[i];

  Tensor x = torch::stable::new_empty(rhs, shape);
  Tensor rank = torch::stable::new_empty(rhs, shape.slice(0, shape.size() - 1), ScalarType::Long);

  const cpu::GramSchmidt batch{R,
                                         G.const_data_ptr<double>(),
                                         rhs.const_data_ptr<double>(),
                                         active.const_data_ptr<bool>(),
                                         tol,
                                         x.mutable_data_ptr<double>(),
                                         rank.mutable_data_ptr<int64_t>()};
  const int64_t grain = std::max<int64_t>(1, 100'000 / (R * R * R / 6 + R * R + 1));  // about 50 us a thread
  torch::stable::parallel_for(0, problems, grain,
                              [&](int64_t begin, int64_t end) { cpu::gram_schmidt(batch, begin, end); });
  return {x, rank};
}

std::tuple<Tensor, Tensor> basis(Tensor G, double tol) {
  STD_TORCH_CHECK(G.is_cpu() && G.scalar_type() == ScalarType::Double, "basis: expected float64 G on the CPU");
  STD_TORCH_CHECK(G.dim() >= 2 && G.size(G.dim() - 1) == G.size(G.dim() - 2), "basis: expected square G [..., K, K]");
  check_size("basis", "G", G);
  check_tolerance("basis", tol);
  G = torch::stable::contiguous(G);
  const auto shape = G.sizes();
  const int64_t K = shape[shape.size() - 1];
  int64_t problems = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) problems *= shape[i];
  Tensor T = torch::stable::new_empty(G, shape);
  Tensor kept = torch::stable::new_empty(G, shape.slice(0, shape.size() - 1), ScalarType::Bool);
  const cpu::Basis batch{K, G.const_data_ptr<double>(), tol, T.mutable_data_ptr<double>(),
                                   kept.mutable_data_ptr<bool>()};
  const int64_t grain = std::max<int64_t>(1, 100'000 / (K * K * K / 3 + K * K + 1));
  torch::stable::parallel_for(0, problems, grain,
                              [&](int64_t begin, int64_t end) { cpu::basis(batch, begin, end); });
  return {T, kept};
}

// Rows along the last dimension; t is made contiguous along it if it is not.
cpu::Rows rows_of(const char* op, const char* name, Tensor& t, int64_t batch = 0) {
  check_floats(op, name, t);
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
  std::vector<cpu::Piece> pieces;
  for (size_t l = 0; l < g.size(); ++l) {
    STD_TORCH_CHECK(g[l].dim() == 2 && Q[l].dim() == 2, "project: expected g [M, P_l] and Q [K, P_l], got ", g[l].dim(),
                    " and ", Q[l].dim(), " dimensions");
    STD_TORCH_CHECK(g[l].size(1) == Q[l].size(1), "project: g and Q differ in width: ", g[l].size(1), " and ", Q[l].size(1));
    STD_TORCH_CHECK(g[l].size(0) == g[0].size(0) && Q[l].size(0) == Q[0].size(0),
                    "project: expected the same numbers of vectors and of rows for every parameter");
    check_floats("project", "g", g[l]);
    out.push_back(torch::stable::new_empty(g[l], g[l].sizes()));
    pieces.push_back({rows_of("project", "Q", Q[l]), rows_of("project", "g", g[l]), rows_of("project", "g", out[l]), g[l].size(1), nullptr});
  }
  cpu::Projection projection(std::move(pieces), Q[0].size(0), g[0].size(0));
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
  check_size("transform", "T", T);
  const int64_t K = T.size(dim - 1);
  T = torch::stable::contiguous(T);
  std::vector<Tensor> out;
  std::vector<cpu::Piece> pieces;
  for (Tensor& t : rows) {
    STD_TORCH_CHECK(t.dim() == dim && t.size(dim - 2) == K && t.size(0) == T.size(0),
                    "transform: expected rows [K, P_l] to go with T [K, K], or [B, K, P_l] with [B, K, K]");
    check_floats("transform", "rows", t);
    Tensor result = torch::stable::new_empty(t, t.sizes());
    for (int64_t b = 0; b < (dim == 3 ? t.size(0) : 1); ++b) {
      const auto from = rows_of("transform", "rows", t, b), to = rows_of("transform", "rows", result, b);
      pieces.push_back({from, {nullptr, 0, from.element}, to, t.size(dim - 1), T.const_data_ptr<double>() + b * K * K});
    }
    out.push_back(result);
  }
  cpu::Projection projection(std::move(pieces), K, K);
  const int64_t grain = std::max<int64_t>(1, 1'000'000 / (projection.work() + 1));
  torch::stable::parallel_for(0, projection.chunks(), grain,
                              [&](int64_t begin, int64_t end) { projection.expand(begin, end); });
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
  const std::string error = cuda::workspace(problems, rows, words);
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
  check_tolerance("gram_schmidt", tol);
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
  cuda::GramSchmidt batch{problems, R, G.const_data_ptr<double>(), tol};
  batch.rhs = rhs.const_data_ptr<double>();
  batch.active = active.const_data_ptr<bool>();
  batch.x = x.mutable_data_ptr<double>();
  batch.rank = rank.mutable_data_ptr<int64_t>();
  batch.workspace = workspace.mutable_data_ptr<double>();
  const std::string error = cuda::solve(batch, current_stream(G));
  STD_TORCH_CHECK(error.empty(), "gram_schmidt: CUDA reports ", error);
  return {x, rank};
}

std::tuple<Tensor, Tensor> basis_cuda(Tensor G, double tol) {
  const int64_t dim = G.dim();
  STD_TORCH_CHECK(G.is_cuda(), "basis: expected G on a CUDA device");
  STD_TORCH_CHECK(G.scalar_type() == ScalarType::Double, "basis: expected float64 G");
  STD_TORCH_CHECK(dim >= 2 && G.size(dim - 1) == G.size(dim - 2), "basis: expected square G [..., K, K]");
  check_size("basis", "G", G);
  check_tolerance("basis", tol);
  const torch::stable::accelerator::DeviceGuard guard(G.get_device());
  G = torch::stable::contiguous(G);
  const auto shape = G.sizes();
  const int64_t K = G.size(dim - 1);
  Tensor T = torch::stable::new_empty(G, shape);
  Tensor kept = torch::stable::new_empty(G, shape.slice(0, dim - 1), ScalarType::Bool);
  int64_t problems = 1;
  for (int64_t i = 0; i + 2 < dim; ++i) problems *= shape[i];
  words_for("basis", problems, K);
  cuda::GramSchmidt batch{problems, K, G.const_data_ptr<double>(), tol};
  batch.inverse = T.mutable_data_ptr<double>();
  batch.kept = kept.mutable_data_ptr<bool>();
  const std::string error = cuda::basis(batch, current_stream(G));
  STD_TORCH_CHECK(error.empty(), "basis: CUDA reports ", error);
  return {T, kept};
}

#endif

}  // namespace
}  // namespace mtu_fast

STABLE_TORCH_LIBRARY_IMPL(mtu_fast, CPU, m) {
  m.impl("basis", TORCH_BOX(&mtu_fast::basis));
  m.impl("gram_schmidt", TORCH_BOX(&mtu_fast::gram_schmidt));
  m.impl("project", TORCH_BOX(&mtu_fast::project));
  m.impl("transform", TORCH_BOX(&mtu_fast::transform));
}

#ifdef MTU_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(mtu_fast, CUDA, m) {
  m.impl("basis", TORCH_BOX(&mtu_fast::basis_cuda));
  m.impl("gram_schmidt", TORCH_BOX(&mtu_fast::gram_schmidt_cuda));
}
#endif
