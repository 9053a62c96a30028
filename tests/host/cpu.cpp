// The CPU kernels of one instruction set, WANTED (Any, Avx2 or Avx512), for ctypes; every tensor is dense.
#include "vectors.h"

#include "../../csrc/cpu/direct.h"
#include "../../csrc/cpu/ghost.h"
#include "../../csrc/cpu/gram.h"
#include "../../csrc/cpu/gram_schmidt.h"
#include "../../csrc/cpu/grouped.h"
#include "../../csrc/cpu/project.h"

using namespace mtu_fast::cpu;

const Vectors mtu_fast::cpu::wanted = Vectors::WANTED;

namespace {

constexpr int64_t BYTES[] = {8, 4, 2, 2};  // of each Element

// [rows, 1, channels, height, width]
Block images(const void* data, int element, int64_t rows, int64_t channels, int64_t height, int64_t width) {
  const int64_t area = height * width;
  return {data, Element(element), {rows, 1, channels, height, width}, {channels * area, channels * area, area, width, 1}};
}

void multiply(Ghost& gram, int64_t rows, double* out) {
  gram.widen(0, gram.panels());
  gram.multiply(0, gram.pairs());
  gram.write(out, rows);
}

void multiply(Direct& gram, double* out) {
  gram.pack(0, gram.wide_rows());
  gram.sum(0, gram.slots());
  gram.write(out);
}

}  // namespace

extern "C" {

// Whether this machine can run them.
int runs() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return wanted == Vectors::Any || (wanted == Vectors::Avx2 ? avx2 : avx512);
}

// J [R, P], of which the last `known` rows meet the others only -> G [R, R]
void row_gram(const char* J, int element, int64_t R, int64_t P, int64_t known, double* G) {
  std::vector<Row> rows;
  for (int64_t r = 0; r < R; ++r) rows.push_back({J + r * P * BYTES[element], Element(element)});
  RowGram gram(std::move(rows), P, known);
  gram.sum(0, gram.chunks());
  gram.write(G);
}

// left [R, S, A], right [T][R, S, B] -> G [T R, T R]
void outer_ghost(const char* left, const char* right, int element, int64_t R, int64_t S, int64_t A, int64_t B, int64_t T,
                 double* G) {
  Ghost::Family family{{left, Element(element), {R, S, A}, {S * A, A, 1}}, {}, {}};
  for (int64_t t = 0; t < T; ++t) {
    family.b.push_back({right + t * R * S * B * BYTES[element], Element(element), {R, S, B}, {S * B, B, 1}});
    family.start.push_back(t * R);
  }
  Ghost gram({family}, {});
  multiply(gram, T * R, G);
}

// the same, from rows
void outer_direct(const char* left, const char* right, int element, int64_t R, int64_t S, int64_t A, int64_t B, int64_t T,
                  double* G) {
  std::vector<Block> gradients;
  std::vector<Direct::Pair> pairs;
  for (int64_t t = 0; t < T; ++t) {
    gradients.push_back({right + t * R * S * B * BYTES[element], Element(element), {R, S, B}, {S * B, B, 1}});
    pairs.push_back({0, t});
  }
  Direct gram({{left, Element(element), {R, S, A}, {S * A, A, 1}}}, gradients, pairs, {});
  multiply(gram, G);
}

// 3 x 3, padding 1: x [R, 1, C, H, W], b [R, 1, O, H, W] -> G [R, R]
void conv_ghost(const char* x, const char* b, int element, int64_t R, int64_t C, int64_t O, int64_t H, int64_t W, double* G) {
  Ghost gram({{images(x, element, R, C, H, W), {images(b, element, R, O, H, W)}, {0}}}, {{3, 3}, {1, 1}, {1, 1}, {1, 1}});
  multiply(gram, R, G);
}

// the same, from rows
void conv_direct(const char* x, const char* b, int element, int64_t R, int64_t C, int64_t O, int64_t H, int64_t W, double* G) {
  const Walk walk{{3, 3}, {1, 1}, {1, 1}, {1, 1}};
  Direct gram({images(x, element, R, C, H, W)}, {images(b, element, R, O, H, W)}, {{0, 0}}, walk);
  multiply(gram, G);
}

// K x K, padding K / 2, stride: x [R, 1, C, H, W], b [R, 1, O, H', W'] -> rows [R, O, C / groups, K, K], zeros before
void grouped_rows(const char* x, const char* b, int element, int64_t R, int64_t C, int64_t O, int64_t H, int64_t W,
                  int64_t groups, int64_t K, int64_t stride, void* out) {
  const auto grid = [&](int64_t size) { return (size + K / 2 * 2 - K) / stride + 1; };
  const Walk walk{{K, K}, {stride, stride}, {K / 2, K / 2}, {1, 1}};
  const Grouped rows(images(x, element, R, C, H, W), images(b, element, R, O, grid(H), grid(W)), groups, walk);
  rows.form(0, rows.parts(), out);
}

// Q [K, P], g [M, P] -> g out of the span, or into it, [M, P], all of one dtype
void project(char* Q, char* g, int element, int64_t K, int64_t M, int64_t P, int into, char* out) {
  const int64_t step = P * BYTES[element];
  Projection projection({{{Q, step, Element(element)}, {g, step, Element(element)}, {out, step, Element(element)}, P, nullptr}}, K, M);
  projection.sum(0, projection.chunks());
  projection.weigh(into);
  projection.expand(0, projection.chunks());
}

void gram_schmidt(const double* G, const double* rhs, const bool* active, int64_t B, int64_t R, double tol, double* x,
                  int64_t* rank) {
  gram_schmidt(GramSchmidt{R, G, rhs, active, tol, x, rank}, 0, B);
}

void basis(const double* G, int64_t B, int64_t K, double tol, double* T, bool* kept) {
  basis(Basis{K, G, tol, T, kept}, 0, B);
}

}  // extern "C"
