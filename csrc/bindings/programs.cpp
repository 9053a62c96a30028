// Convex programs over one small Gram matrix.

#include <tuple>

#include "../cpu/complementary.h"
#include "arguments.h"
#include "tensors.h"

namespace mtu_fast {
namespace {

std::tuple<Tensor, Tensor> complementary(Tensor M, Tensor q, bool dependent) {
  STD_TORCH_CHECK(M.is_cpu() && q.is_cpu(), "complementary: expected M and q on the CPU");
  STD_TORCH_CHECK(M.scalar_type() == ScalarType::Double && q.scalar_type() == ScalarType::Double,
                  "complementary: expected float64 M and q");
  check_size("complementary", "M", M);
  check_size("complementary", "q", q);
  STD_TORCH_CHECK(M.dim() == 2 && M.size(0) == M.size(1), "complementary: expected square M [n, n]");
  STD_TORCH_CHECK(q.dim() == 2 && q.size(1) == M.size(0), "complementary: expected q [K, n] to go with M [n, n]");
  M = torch::stable::contiguous(M);
  q = torch::stable::contiguous(q);
  const int64_t K = q.size(0), n = q.size(1);
  Tensor x = torch::stable::new_empty(q, {K, n});
  Tensor ended = torch::stable::new_empty(q, {K}, ScalarType::Bool);
  const cpu::Complementary batch{n, M.const_data_ptr<double>(), q.const_data_ptr<double>(), dependent,
                                 x.mutable_data_ptr<double>(), ended.mutable_data_ptr<bool>()};
  const int64_t work = n * n * n;  // of a few factors
  torch::stable::parallel_for(0, K, chunks_at_once(work),
                              [&](int64_t begin, int64_t end) { cpu::complementary(batch, begin, end); });
  return {x, ended};
}

}  // namespace
}  // namespace mtu_fast

STABLE_TORCH_LIBRARY_IMPL(mtu_fast, CPU, m) { m.impl("complementary", TORCH_BOX(&mtu_fast::complementary)); }
