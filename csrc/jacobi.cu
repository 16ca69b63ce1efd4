// A⁺ G for a batch, one thread block a matrix, with no word from the host: the `svd` and `auto` solvers on CUDA.
#include <cuda_runtime.h>
#include <stdint.h>

#include "jacobi.h"

namespace srm {
namespace {

constexpr int kThreads = 256;

struct Block {
  static constexpr int kLanes = 32;
  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int group() const { return threadIdx.x / 32; }
  __device__ int groups() const { return kThreads / 32; }
  __device__ bool leader() const { return threadIdx.x == 0; }
  __device__ void barrier() const { __syncthreads(); }
  __device__ float sum(float value) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
  }
  __device__ float from(float value, int lane) const { return __shfl_sync(~0u, value, lane); }
  // Floats that are not negative are ordered as their bits are.
  __device__ void raise(float* at, float value) const { atomicMax(reinterpret_cast<int*>(at), __float_as_int(value)); }
};

__global__ void __launch_bounds__(kThreads) solve(const float* a, float* x, const uint8_t* wanted, int r, int d,
                                                  bool transposed, bool keep_all) {
  const int64_t matrix = blockIdx.x;
  if (wanted != nullptr && !wanted[matrix]) return;
  extern __shared__ float rows[];
  __shared__ float weights[kLargest];
  __shared__ float widest;
  a += matrix * r * r;
  for (int t = threadIdx.x; t < r * r; t += kThreads) rows[t] = a[transposed ? t % r * r + t / r : t];
  Block block;
  pseudo_inverse(block, rows, x + matrix * r * d, weights, &widest, r, d, keep_all);
}

}  // namespace
}  // namespace srm

// X = A⁺ G, or (Aᵀ)⁺ G: a (batch, r, r), x (batch, r, d) holding G, both contiguous fp32 on the device of `stream`.
// Matrices whose `wanted` is 0 are left as they are; null wants all. Returns a cudaError_t; r ≤ 128, batch < 2³¹.
extern "C" int srm_jacobi_solve(const float* a, float* x, const uint8_t* wanted, int64_t batch, int r, int d,
                                int transposed, int keep_all, void* stream) {
  if (batch <= 0 || d <= 0) return cudaSuccess;
  if (r < 1 || r > srm::kLargest || batch > 2147483647) return cudaErrorInvalidValue;
  const int bytes = r * r * static_cast<int>(sizeof(float));
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(srm::solve, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  srm::solve<<<static_cast<unsigned>(batch), srm::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(
      a, x, wanted, r, d, transposed != 0, keep_all != 0);
  return cudaGetLastError();
}
