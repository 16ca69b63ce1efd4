// Computes X = (W + λI)⁻¹ G for one matrix, on one thread (docs/METHOD.md §2.1). W is the softmax of the symmetric part
// of the logits, and λ = ridge · tr(W)/r.
//
// The code applies Gaussian elimination without pivoting to W + λI. This matrix is E⁻¹ (S + λI) E, with S symmetric and
// E diagonal (docs/CONDITIONING.md). The factors E⁻¹ and E do not change the pivots. The pivots are therefore the
// squares of the diagonal entries of the Cholesky factor of S + λI. The code computes neither S nor E.
//
// The compiler vectorises the simple loops over columns. It vectorises reductions only with -fopenmp-simd.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "elementary.h"

namespace srm {

// Writes softmax(l) + λI to a (r×r), where l is the symmetric part of the logits. Returns false in three cases: a logit
// is not finite; the logits are not symmetric within 1e-3·(1 + max|l|); the logsumexp values of two rows differ so much
// that S underflows. In these cases, the reference does not use Cholesky either.
template <class T>
SRM_INLINE bool landmark_matrix(const T* logits, T* a, int64_t r, T ridge) {
  using limits = std::numeric_limits<T>;
  T largest = 0, skew = 0;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const T lower = logits[i * r + j], upper = logits[j * r + i], mean = (lower + upper) / 2;
      const T size = std::abs(lower) > std::abs(upper) ? std::abs(lower) : std::abs(upper);
      if (!(std::abs(mean) <= limits::max())) return false;  // also where one of the two is not finite
      largest = size > largest ? size : largest;
      skew = std::abs(lower - mean) > skew ? std::abs(lower - mean) : skew;
      a[i * r + j] = a[j * r + i] = mean;
    }
  }
  if (!(skew <= T(1e-3) / 2 * (1 + largest))) return false;
  T trace = 0, low = limits::infinity(), high = -limits::infinity();
  for (int64_t i = 0; i < r; ++i) {
    T* row = a + i * r;
    T most = row[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < r; ++j) most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < r; ++j) sum += row[j] = exponential(row[j] - most);
    for (int64_t j = 0; j < r; ++j) row[j] /= sum;
    trace += row[i];
    const T lse = most + std::log(sum);
    low = std::min(low, lse);
    high = std::max(high, lse);
  }
  const T rounding = T(1e-3) * limits::epsilon();
  if (!(high - low <= 2 * std::log(rounding) - std::log(limits::min()))) return false;
  for (int64_t i = 0; i < r; ++i) a[i * r + i] += ridge * trace / r;
  return true;
}

template <class T>
SRM_INLINE void subtract(T* __restrict from, const T* __restrict row, T factor, int64_t count) {
  for (int64_t j = 0; j < count; ++j) from[j] -= factor * row[j];
}

// Subtracts four scaled rows in one pass over `from`, with fewer memory accesses and fewer rounding errors.
template <class T>
SRM_INLINE void subtract(T* __restrict from, const T* __restrict rows, int64_t stride, const T* factor, int64_t count) {
  const T a = factor[0], b = factor[1], c = factor[2], d = factor[3];
  for (int64_t j = 0; j < count; ++j)
    from[j] -= (a * rows[j] + b * rows[stride + j]) + (c * rows[2 * stride + j] + d * rows[3 * stride + j]);
}

// x (r×d) contains G at the call and X on return. a is scratch memory of r·r numbers. Returns false if landmark_matrix
// returns false, or if a pivot is not positive or not finite. The content of x is then invalid. In these cases, the
// reference does not use Cholesky either.
template <class T>
SRM_INLINE bool symmetric_solve(const T* logits, T* x, T* a, int64_t r, int64_t d, T ridge) {
  if (!landmark_matrix(logits, a, r, ridge)) return false;
  for (int64_t i = 0; i < r; ++i) {
    T* row = a + i * r;
    for (int64_t k = 0; k < i; k += 4) {
      const int64_t block = i - k < 4 ? i - k : 4;
      T factor[4];
      for (int64_t q = 0; q < block; ++q) {
        T entry = row[k + q];
        for (int64_t p = 0; p < q; ++p) entry -= factor[p] * a[(k + p) * r + k + q];
        factor[q] = entry * a[(k + q) * r + k + q];
      }
      if (block == 4) {
        subtract(row + k + 4, a + k * r + k + 4, r, factor, r - k - 4);
        subtract(x + i * d, x + k * d, d, factor, d);
        continue;
      }
      for (int64_t q = 0; q < block; ++q) {
        subtract(row + i, a + (k + q) * r + i, factor[q], r - i);
        subtract(x + i * d, x + (k + q) * d, factor[q], d);
      }
    }
    if (!(row[i] > 0 && row[i] <= std::numeric_limits<T>::max())) return false;
    row[i] = 1 / row[i];  // later steps multiply by it
  }
  for (int64_t i = r - 1; i >= 0; --i) {
    const T* row = a + i * r;
    int64_t k = i + 1;
    for (; k + 4 <= r; k += 4) subtract(x + i * d, x + k * d, d, row + k, d);
    for (; k < r; ++k) subtract(x + i * d, x + k * d, row[k], d);
    for (int64_t c = 0; c < d; ++c) x[i * d + c] *= row[i];
  }
  return true;
}

}  // namespace srm
