// The only file that knows torch and Python: checks arguments, registers kernels with the dispatcher, states build facts.
// It uses torch's stable ABI, so that one binary serves every torch from the target version on.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/gram.h"
#include "cpu/gram_schmidt.h"
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

std::optional<mtu_fast::cpu::Element> element(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return mtu_fast::cpu::Element::Double;
    case ScalarType::Float: return mtu_fast::cpu::Element::Float;
    case ScalarType::BFloat16: return mtu_fast::cpu::Element::BFloat16;
    case ScalarType::Half: return mtu_fast::cpu::Element::Half;
    default: return std::nullopt;
  }
}

Tensor row_gram(std::vector<Tensor> blocks) {
  STD_TORCH_CHECK(!blocks.empty(), "row_gram: expected at least one block of rows");
  std::vector<mtu_fast::cpu::Row> rows;
  for (Tensor& t : blocks) {
    STD_TORCH_CHECK(t.is_cpu(), "row_gram: expected every block on the CPU");
    STD_TORCH_CHECK(t.dim() == 2, "row_gram: expected blocks [R_i, P], got ", t.dim(), " dimensions");
    STD_TORCH_CHECK(t.size(1) == blocks[0].size(1), "row_gram: expected blocks of one width, got ", blocks[0].size(1),
                    " and ", t.size(1));
    if (!element(t)) t = torch::stable::to(t, ScalarType::Double);
    if (t.size(1) > 1 && t.stride(1) != 1) t = torch::stable::contiguous(t);
    const auto* data = static_cast<const char*>(t.const_data_ptr());
    const int64_t step = t.stride(0) * t.element_size();
    for (int64_t r = 0; r < t.size(0); ++r) rows.push_back({data + r * step, *element(t)});
  }
  const int64_t R = rows.size();
  Tensor out = torch::stable::new_empty(blocks[0], {R, R}, ScalarType::Double);
  mtu_fast::cpu::RowGram gram(std::move(rows), blocks[0].size(1));
  const int64_t grain = std::max<int64_t>(1, 1'000'000 / (gram.work() + 1));  // about 50 us a thread
  torch::stable::parallel_for(0, gram.chunks(), grain, [&](int64_t begin, int64_t end) { gram.sum(begin, end); });
  gram.write(out.mutable_data_ptr<double>());
  return out;
}

#ifdef MTU_FAST_CUDA

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
  return stream;
}

int64_t words_for(const char* op, int64_t problems, int64_t rows) {
  const int64_t words = mtu_fast::cuda::workspace_words(problems, rows);
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
  const char* error = mtu_fast::cuda::solve(batch, current_stream(G));
  STD_TORCH_CHECK(*error == 0, "gram_schmidt: ", error);
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
  const char* error = mtu_fast::cuda::basis(batch, current_stream(G));
  STD_TORCH_CHECK(*error == 0, "basis: ", error);
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
  m.impl("gram_schmidt", TORCH_BOX(&gram_schmidt));
  m.impl("row_gram", TORCH_BOX(&row_gram));
}

#ifdef MTU_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(mtu_fast, CUDA, m) {
  m.impl("gram_schmidt", TORCH_BOX(&gram_schmidt_cuda));
  m.impl("basis", TORCH_BOX(&basis_cuda));
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of mtu_fast; importing this module registers them with torch's dispatcher.";
  m.def("build_facts", &build_facts, "How this binary was built.");
}
