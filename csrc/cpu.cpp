// torch.ops.srm_cpu.symmetric_solve on torch's stable ABI: one build serves every torch from TORCH_TARGET_VERSION on.
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

template <class T>
void solve(const Tensor& logits, const Tensor& x, bool* served, int64_t batch, double ridge) {
  const T* l = static_cast<const T*>(logits.data_ptr());
  T* g = static_cast<T*>(x.data_ptr());
  const int64_t r = x.size(x.dim() - 2), d = x.size(x.dim() - 1);
  torch::stable::parallel_for(0, batch, 1 + kGrain / (r * r * (r + d)), [=](int64_t begin, int64_t end) {
    std::vector<T> work(r * r);
    for (int64_t m = begin; m < end; ++m)
      served[m] = srm::symmetric_solve(l + m * r * r, g + m * r * d, work.data(), r, d, ridge);
  });
}

// x (…, r, d) holds G and takes X; logits (…, r, r); served (…) bool takes whether it did.
void symmetric_solve(const Tensor& logits, const Tensor& x, const Tensor& served, double ridge) {
  const ScalarType dtype = logits.scalar_type();
  const int64_t batch = served.numel(), r = x.size(x.dim() - 2), d = x.size(x.dim() - 1);
  if ((dtype != ScalarType::Float && dtype != ScalarType::Double) || x.scalar_type() != dtype ||
      served.scalar_type() != ScalarType::Bool || !logits.is_contiguous() || !x.is_contiguous() ||
      !served.is_contiguous() || logits.numel() != batch * r * r || x.numel() != batch * r * d)
    throw std::invalid_argument(
        "srm_cpu::symmetric_solve: logits (batch, r, r) and x (batch, r, d), float32 or float64, and served (batch), "
        "bool, are contiguous");
  (dtype == ScalarType::Float ? solve<float> : solve<double>)(logits, x, static_cast<bool*>(served.data_ptr()), batch,
                                                               ridge);
}

}  // namespace

STABLE_TORCH_LIBRARY(srm_cpu, m) {
  m.def("symmetric_solve(Tensor logits, Tensor(a!) x, Tensor(b!) served, float ridge) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srm_cpu, CPU, m) { m.impl("symmetric_solve", TORCH_BOX(&symmetric_solve)); }
