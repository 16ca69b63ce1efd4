// Registers the operators of torch.ops.srm_cpu: the default landmark solve, and softmax, tanh and pooling for the fused
// neck. The code uses torch's stable ABI. One build therefore works with TORCH_TARGET_VERSION and later torch versions.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cholesky.h"
#include "tile.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 16;  // minimum number of multiply-adds per thread
constexpr int64_t kRank = 64;        // the default r

// Compiles each function twice: once for all x86-64 processors, and once for processors with AVX2 and FMA. The dynamic
// loader chooses one of the two versions.
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12
#define SRM_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define SRM_CLONES
#endif

SRM_CLONES bool solve_one(const float* logits, float* x, float* work, int64_t r, int64_t d, double ridge) {
  return srm::symmetric_solve(logits, x, work, r, d, static_cast<float>(ridge));
}

SRM_CLONES bool solve_one(const double* logits, double* x, double* work, int64_t r, int64_t d, double ridge) {
  return srm::symmetric_solve(logits, x, work, r, d, ridge);
}

template <class T>
void solve(const Tensor& logits, const Tensor& x, bool* served, int64_t batch, double ridge) {
  const T* l = static_cast<const T*>(logits.data_ptr());
  T* g = static_cast<T*>(x.data_ptr());
  const int64_t r = x.size(x.dim() - 2), d = x.size(x.dim() - 1);
  torch::stable::parallel_for(0, batch, 1 + kGrain / (r * r * (r + d)), [=](int64_t begin, int64_t end) {
    std::vector<T> work(r * r);
    for (int64_t m = begin; m < end; ++m)
      served[m] = solve_one(l + m * r * r, g + m * r * d, work.data(), r, d, ridge);
  });
}

// logits is (…, r, r). x (…, r, d) contains G at the call and X on return. served (…), of dtype bool, becomes true for
// each matrix that was solved, and false for the others. Returns the number of matrices that were not solved.
int64_t symmetric_solve(const Tensor& logits, const Tensor& x, const Tensor& served, double ridge) {
  const ScalarType dtype = logits.scalar_type();
  const int64_t batch = served.numel(), r = x.size(x.dim() - 2), d = x.size(x.dim() - 1);
  if ((dtype != ScalarType::Float && dtype != ScalarType::Double) || x.scalar_type() != dtype ||
      served.scalar_type() != ScalarType::Bool || !logits.is_contiguous() || !x.is_contiguous() ||
      !served.is_contiguous() || logits.numel() != batch * r * r || x.numel() != batch * r * d)
    throw std::invalid_argument(
        "srm_cpu::symmetric_solve: expected contiguous logits (batch, r, r) and x (batch, r, d) in float32 or float64, "
        "and contiguous served (batch) in bool");
  bool* done = static_cast<bool*>(served.data_ptr());
  (dtype == ScalarType::Float ? solve<float> : solve<double>)(logits, x, done, batch, ridge);
  return std::count(done, done + batch, false);
}

// Calls a template for float or for double, according to the tensor's dtype.
template <class Call>
void by_dtype(const Tensor& tensor, Call call) {
  tensor.scalar_type() == ScalarType::Float ? call(float{}) : call(double{});
}

bool usable(const Tensor& tensor, ScalarType dtype) {
  return tensor.is_contiguous() && tensor.scalar_type() == dtype &&
         (dtype == ScalarType::Float || dtype == ScalarType::Double);
}

SRM_CLONES void tanh_some(float* x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = srm::hyperbolic_tangent(x[i]);
}

SRM_CLONES void tanh_some(double* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = srm::hyperbolic_tangent(x[i]);
}

// Replaces x by tanh(x).
void tanh_(const Tensor& x) {
  if (!usable(x, x.scalar_type()))
    throw std::invalid_argument("srm_cpu::tanh_: expected a contiguous x in float32 or float64");
  by_dtype(x, [&](auto zero) {
    auto* values = static_cast<decltype(zero)*>(x.data_ptr());
    torch::stable::parallel_for(0, x.numel(), kGrain, [=](int64_t begin, int64_t end) {
      tanh_some(values + begin, end - begin);
    });
  });
}

// With the default r as a compile-time constant, pool_head takes a quarter less time.
SRM_CLONES void pool_head(float* logits, float* pooled, float* work, int64_t r, srm::Tile tile) {
  if (r == kRank) return srm::softmax_pool(logits, pooled, work, kRank, tile);
  srm::softmax_pool(logits, pooled, work, r, tile);
}

SRM_CLONES void pool_head(double* logits, double* pooled, double* work, int64_t r, srm::Tile tile) {
  srm::softmax_pool(logits, pooled, work, r, tile);
}

SRM_CLONES void pool_head_backward(float* logits, const float* grad, float* work, int64_t r, srm::Tile tile) {
  if (r == kRank) return srm::softmax_pool_backward(logits, grad, work, kRank, tile);
  srm::softmax_pool_backward(logits, grad, work, r, tile);
}

SRM_CLONES void pool_head_backward(double* logits, const double* grad, double* work, int64_t r, srm::Tile tile) {
  srm::softmax_pool_backward(logits, grad, work, r, tile);
}

// Calls `call` once for each head, with the head's part (M, r) of logits (H, M, r) and the head's part (P, P·r) of
// pooled (H, P, P·r). Each head is processed by one thread.
template <class Call>
void of_heads(const Tensor& logits, const Tensor& pooled, const srm::Tile& tile, Call call) {
  const ScalarType dtype = logits.scalar_type();
  if (!usable(logits, dtype) || !usable(pooled, dtype) || logits.dim() != 3 || tile.start < 0 ||
      tile.stop > tile.height * tile.width || logits.size(1) != tile.stop - tile.start ||
      pooled.numel() != logits.size(0) * tile.size * tile.size * logits.size(2))
    throw std::invalid_argument(
        "srm_cpu: expected contiguous logits (heads, stop - start, r) and pooled (heads, size, size * r) in float32 or "
        "float64, and a tile inside the map");
  const int64_t count = logits.size(1), r = logits.size(2), cells = tile.size * tile.size;
  by_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    T* l = static_cast<T*>(logits.data_ptr());
    T* p = static_cast<T*>(pooled.data_ptr());
    torch::stable::parallel_for(0, logits.size(0), 1 + kGrain / (count * r), [=](int64_t begin, int64_t end) {
      std::vector<T> work((tile.size + 1) * r);
      for (int64_t head = begin; head < end; ++head)
        call(l + head * count * r, p + head * cells * r, work.data(), r, tile);
    });
  });
}

// Replaces logits by their softmax. pooled accumulates the cell means: the operator adds the contribution of the tile.
void softmax_pool_(const Tensor& logits, const Tensor& pooled, int64_t height, int64_t width, int64_t size, int64_t start,
                   int64_t stop) {
  of_heads(logits, pooled, {height, width, size, start, stop}, [](auto... a) { pool_head(a...); });
}

// Replaces logits by the gradient of the logits. grad is the gradient of the cell means.
void softmax_pool_backward_(const Tensor& logits, const Tensor& grad, int64_t height, int64_t width, int64_t size,
                            int64_t start, int64_t stop) {
  of_heads(logits, grad, {height, width, size, start, stop}, [](auto... a) { pool_head_backward(a...); });
}

SRM_CLONES void means_of(const float* m, float* means, float* work, int64_t h, int64_t w, int64_t size) {
  srm::cell_means(m, means, work, h, w, size);
}

SRM_CLONES void means_of(const double* m, double* means, double* work, int64_t h, int64_t w, int64_t size) {
  srm::cell_means(m, means, work, h, w, size);
}

// Writes the means of a map (C, h, w) over the cells of adaptive average pooling to means (C, P, P).
void cell_means_(const Tensor& means, const Tensor& map) {
  const ScalarType dtype = map.scalar_type();
  if (!usable(map, dtype) || !usable(means, dtype) || map.dim() != 3 || means.dim() != 3 ||
      means.size(0) != map.size(0) || means.size(1) != means.size(2))
    throw std::invalid_argument(
        "srm_cpu::cell_means_: expected contiguous means (channels, size, size) and map (channels, height, width) in "
        "float32 or float64");
  const int64_t h = map.size(1), w = map.size(2), size = means.size(1);
  by_dtype(map, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(map.data_ptr());
    T* to = static_cast<T*>(means.data_ptr());
    torch::stable::parallel_for(0, map.size(0), 1 + kGrain / (h * w), [=](int64_t begin, int64_t end) {
      std::vector<T> work(w);
      for (int64_t c = begin; c < end; ++c)
        means_of(from + c * h * w, to + c * size * size, work.data(), h, w, size);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(srm_cpu, m) {
  m.def("symmetric_solve(Tensor logits, Tensor(a!) x, Tensor(b!) served, float ridge) -> int");
  m.def("tanh_(Tensor(a!) x) -> ()");
  m.def("cell_means_(Tensor(a!) means, Tensor map) -> ()");
  m.def("softmax_pool_(Tensor(a!) logits, Tensor(b!) pooled, int height, int width, int size, int start, int stop) -> ()");
  m.def("softmax_pool_backward_(Tensor(a!) logits, Tensor grad, int height, int width, int size, int start, int stop) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srm_cpu, CPU, m) {
  m.impl("symmetric_solve", TORCH_BOX(&symmetric_solve));
  m.impl("tanh_", TORCH_BOX(&tanh_));
  m.impl("cell_means_", TORCH_BOX(&cell_means_));
  m.impl("softmax_pool_", TORCH_BOX(&softmax_pool_));
  m.impl("softmax_pool_backward_", TORCH_BOX(&softmax_pool_backward_));
}
