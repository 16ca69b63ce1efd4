// X = (W + λI)⁻¹ G of one matrix on one thread, W = softmax of the symmetric part of the logits, λ = ridge · tr(W)/r.
//
// W + λI = E⁻¹ (S + λI) E with S symmetric and E diagonal (docs/CONDITIONING.md), so that elimination without pivoting
// has exactly the pivots of Cholesky on S + λI, and needs neither S nor E.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace srm {

template <class T>
inline void subtract(T* __restrict from, const T* __restrict row, T factor, int64_t count) {
  for (int64_t c = 0; c < count; ++c) from[c] -= factor * row[c];
}

// a (r×r) takes softmax(l) + λI, l the symmetric part of the logits. False where these are not finite or not symmetric
// within 1e-3·(1 + max|l|), or where their rows' logsumexp lie so far apart that S underflows: the reference then has no
// Cholesky either.
template <class T>
inline bool landmark_matrix(const T* logits, T* a, int64_t r, double ridge) {
  using limits = std::numeric_limits<T>;
  T largest = 0, skew = 0;
  bool finite = true;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const T lower = logits[i * r + j], upper = logits[j * r + i], mean = (lower + upper) / 2;
      finite = finite && std::isfinite(lower) && std::isfinite(upper);
      largest = std::max(largest, std::max(std::abs(lower), std::abs(upper)));
      skew = std::max(skew, std::abs(lower - mean));
      a[i * r + j] = a[j * r + i] = mean;
    }
  }
  if (!finite || !(skew <= T(1e-3) / 2 * (1 + largest))) return false;
  T trace = 0, low = limits::infinity(), high = -limits::infinity();
  for (int64_t i = 0; i < r; ++i) {
    T* row = a + i * r;
    const T most = *std::max_element(row, row + r);
    T sum = 0;
    for (int64_t j = 0; j < r; ++j) sum += row[j] = std::exp(row[j] - most);
    for (int64_t j = 0; j < r; ++j) row[j] /= sum;
    trace += row[i];
    low = std::min(low, most + std::log(sum));
    high = std::max(high, most + std::log(sum));
  }
  const T rounding = T(1e-3) * limits::epsilon();
  if (!(high - low <= 2 * std::log(rounding) - std::log(limits::min()))) return false;
  for (int64_t i = 0; i < r; ++i) a[i * r + i] += T(ridge) * trace / r;
  return true;
}

// x (r×d) holds G and takes X; work is r·r scratch. False, and x spoiled, where the reference would not serve the matrix
// by Cholesky: see landmark_matrix, and a pivot that is not positive and finite.
template <class T>
inline bool symmetric_solve(const T* logits, T* x, T* work, int64_t r, int64_t d, double ridge) {
  if (!landmark_matrix(logits, work, r, ridge)) return false;
  for (int64_t k = 0; k < r; ++k) {
    const T* row = work + k * r;
    if (!(row[k] > 0 && std::isfinite(row[k]))) return false;
    for (int64_t i = k + 1; i < r; ++i) {
      const T factor = work[i * r + k] / row[k];
      subtract(work + i * r + k + 1, row + k + 1, factor, r - k - 1);
      subtract(x + i * d, x + k * d, factor, d);
    }
  }
  for (int64_t k = r - 1; k >= 0; --k) {
    for (int64_t c = 0; c < d; ++c) x[k * d + c] /= work[k * r + k];
    for (int64_t i = 0; i < k; ++i) subtract(x + i * d, x + k * d, work[i * r + k], d);
  }
  return true;
}

}  // namespace srm
