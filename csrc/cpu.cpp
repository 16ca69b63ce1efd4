// torch.ops.srm_cpu.symmetric_solve on torch's stable ABI: one build serves every torch from TORCH_TARGET_VERSION on.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cholesky.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 16;  // multiply-adds that are worth a thread

// One machine code for every processor, and one for those with AVX2 and FMA.
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

// x (…, r, d) holds G and takes X; logits (…, r, r); served (…) bool takes whether it did. How many did not.
int64_t symmetric_solve(const Tensor& logits, const Tensor& x, const Tensor& served, double ridge) {
  const ScalarType dtype = logits.scalar_type();
  const int64_t batch = served.numel(), r = x.size(x.dim() - 2), d = x.size(x.dim() - 1);
  if ((dtype != ScalarType::Float && dtype != ScalarType::Double) || x.scalar_type() != dtype ||
      served.scalar_type() != ScalarType::Bool || !logits.is_contiguous() || !x.is_contiguous() ||
      !served.is_contiguous() || logits.numel() != batch * r * r || x.numel() != batch * r * d)
    throw std::invalid_argument(
        "srm_cpu::symmetric_solve: logits (batch, r, r) and x (batch, r, d), float32 or float64, and served (batch), "
        "bool, are contiguous");
  bool* done = static_cast<bool*>(served.data_ptr());
  (dtype == ScalarType::Float ? solve<float> : solve<double>)(logits, x, done, batch, ridge);
  return std::count(done, done + batch, false);
}

}  // namespace

STABLE_TORCH_LIBRARY(srm_cpu, m) {
  m.def("symmetric_solve(Tensor logits, Tensor(a!) x, Tensor(b!) served, float ridge) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(srm_cpu, CPU, m) { m.impl("symmetric_solve", TORCH_BOX(&symmetric_solve)); }
