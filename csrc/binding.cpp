// torch.ops.srm_cuda.jacobi_solve on torch's stable ABI: one build serves every torch from TORCH_TARGET_VERSION on.
#include <cstdint>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

extern "C" int srm_jacobi_solve(const float*, float*, const uint8_t*, int64_t, int, int, int, int, void*);
// CPU builds of torch have no such symbol, and need none.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using torch::stable::Tensor;

void require(bool good, const char* sentence) {
  if (!good) throw std::invalid_argument(sentence);
}

// x (…, r, d) holds G and takes X; a (…, r, r); wanted (…) uint8, all ones to want all.
void jacobi_solve(const Tensor& a, const Tensor& x, const Tensor& wanted, bool transposed, bool keep_all) {
  using torch::headeronly::ScalarType;
  require(a.scalar_type() == ScalarType::Float && x.scalar_type() == ScalarType::Float,
          "srm_cuda::jacobi_solve: a and x are float32");
  require(wanted.scalar_type() == ScalarType::Byte, "srm_cuda::jacobi_solve: wanted is uint8");
  require(a.is_contiguous() && x.is_contiguous() && wanted.is_contiguous(),
          "srm_cuda::jacobi_solve: tensors are contiguous");
  const int64_t r = x.size(x.dim() - 2), d = x.size(x.dim() - 1);
  require(a.numel() == wanted.numel() * r * r && x.numel() == wanted.numel() * r * d,
          "srm_cuda::jacobi_solve: a is (batch, r, r), x (batch, r, d) and wanted (batch)");
  require(aoti_torch_get_current_cuda_stream != nullptr, "srm_cuda::jacobi_solve: this torch has no CUDA");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device());  // kernels are launched on the current device
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream(a.get_device(), &stream) == 0, "srm_cuda::jacobi_solve: no stream");
  const int error = srm_jacobi_solve(static_cast<const float*>(a.data_ptr()), static_cast<float*>(x.data_ptr()),
                                     static_cast<const uint8_t*>(wanted.data_ptr()), wanted.numel(),
                                     static_cast<int>(r), static_cast<int>(d), transposed, keep_all, stream);
  if (error != 0) throw std::runtime_error("srm_cuda::jacobi_solve: CUDA error " + std::to_string(error));
}

}  // namespace

STABLE_TORCH_LIBRARY(srm_cuda, m) {
  m.def("jacobi_solve(Tensor a, Tensor(x!) x, Tensor wanted, bool transposed, bool keep_all) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srm_cuda, CUDA, m) { m.impl("jacobi_solve", TORCH_BOX(&jacobi_solve)); }
