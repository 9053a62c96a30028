// Tensors as kernels see them. The files of this folder are the only ones that know torch and Python: they check arguments
// and register kernels with the dispatcher, by torch's stable ABI, so that one binary serves every torch from the target
// version on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../cpu/block.h"

namespace mtu_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::optional<cpu::Element> element(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return cpu::Element::Double;
    case ScalarType::Float: return cpu::Element::Float;
    case ScalarType::BFloat16: return cpu::Element::BFloat16;
    case ScalarType::Half: return cpu::Element::Half;
    default: return std::nullopt;
  }
}

inline cpu::Block block(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  return {t.const_data_ptr(), *element(t), {size.begin(), size.end()}, {stride.begin(), stride.end()}};
}

inline bool same(const Tensor& a, const Tensor& b) {
  const auto size = a.sizes(), other = b.sizes();
  const auto stride = a.strides(), step = b.strides();
  return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() &&
         std::equal(size.begin(), size.end(), other.begin(), other.end()) &&
         std::equal(stride.begin(), stride.end(), step.begin(), step.end());
}

// Which block each block is the same tensor as: the first of them.
inline std::vector<size_t> firsts(const std::vector<Tensor>& blocks) {
  std::vector<size_t> found;
  for (size_t i = 0; i < blocks.size(); ++i) {
    size_t first = 0;
    while (!same(blocks[first], blocks[i])) ++first;
    found.push_back(first);
  }
  return found;
}

inline int64_t chunks_at_once(int64_t work) { return std::max<int64_t>(1, 1'000'000 / (work + 1)); }  // about 50 us a thread

}  // namespace mtu_fast
