// Runs the CUDA kernels of gram_schmidt.cu on the CPU: problems from the file named first, results to the second.
//
// In, for each call: int64 B, R, whether `basis`, bytes of shared memory a block may have (negative: the device does not
// say); float64 tol; float64 G [B, R, R]; for `solve` float64 rhs [B, R] and a byte for each of `active` [R]. Out: float64
// x [B, R], int64 rank [B]; or float64 T [B, R, R], a byte for each of `kept` [B, R]. Each call runs in three orders of
// threads, whose bits must be the same.

#include "../../csrc/cuda/gram_schmidt.cu"

#include <fstream>
#include <limits>

namespace {

using Bytes = std::vector<char>;

template <typename T>
std::vector<T> read(std::istream& in, int64_t count) {
  std::vector<T> values(count);
  in.read(reinterpret_cast<char*>(values.data()), count * sizeof(T));
  if (!in) host::fail("the file of problems ends early");
  return values;
}

template <typename T>
void append(Bytes& out, const std::vector<T>& values) {
  const char* data = reinterpret_cast<const char*>(values.data());
  out.insert(out.end(), data, data + values.size() * sizeof(T));
}

Bytes run(bool inverse, mtu_fast::cuda::GramSchmidt batch) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const int64_t B = batch.problems, R = batch.rows;
  std::vector<double> x(inverse ? B * R * R : B * R, nan);
  std::vector<int64_t> rank(inverse ? 0 : B, -1);
  std::vector<char> kept(inverse ? B * R : 0, -1);
  int64_t words = 0;
  const std::string refused = inverse ? "" : mtu_fast::cuda::workspace(B, R, words);
  if (!refused.empty()) host::fail(refused);
  std::vector<double> workspace(std::max<int64_t>(words, 0), nan);
  batch.x = batch.inverse = x.data();
  batch.rank = rank.data();
  batch.kept = reinterpret_cast<bool*>(kept.data());
  batch.workspace = workspace.data();
  const std::string error = inverse ? mtu_fast::cuda::basis(batch, nullptr) : mtu_fast::cuda::solve(batch, nullptr);
  if (!error.empty()) host::fail(error);
  Bytes out;
  append(out, x);
  append(out, rank);
  append(out, kept);
  return out;
}

}  // namespace

int main(int count, char** names) {
  if (count != 3) host::fail("usage: gram_schmidt PROBLEMS RESULTS");
  std::ifstream in(names[1], std::ios::binary);
  std::ofstream out(names[2], std::ios::binary);
  while (in.peek() != std::ifstream::traits_type::eof()) {
    const auto head = read<int64_t>(in, 4);
    const int64_t B = head[0], R = head[1];
    const bool inverse = head[2] != 0;
    host::shared_limit = static_cast<int>(head[3]);
    const double tol = read<double>(in, 1)[0];
    const auto G = read<double>(in, B * R * R);
    const auto rhs = read<double>(in, inverse ? 0 : B * R);
    const auto active = read<char>(in, inverse ? 0 : R);
    mtu_fast::cuda::GramSchmidt batch{B, R, G.data(), tol, rhs.data(), reinterpret_cast<const bool*>(active.data())};
    host::order = host::Order::ASCENDING;
    const Bytes first = run(inverse, batch);
    for (host::Order order : {host::Order::DESCENDING, host::Order::RANDOM}) {
      host::order = order;
      if (run(inverse, batch) != first) host::fail("R = " + std::to_string(R) + ": the result depends on the order of threads");
    }
    out.write(first.data(), static_cast<std::streamsize>(first.size()));
  }
}
