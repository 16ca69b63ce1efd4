// exp and tanh. Compilers can vectorise the float versions. The standard library has no vector versions.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#define SRM_INLINE [[gnu::always_inline]] inline

namespace srm {

SRM_INLINE double exponential(double x) { return std::exp(x); }

// Returns exp(x) with an error of at most 2 ulp. x must be at most 0. For x ≤ −87, the result is 0. NaN stays NaN. The
// polynomial is from the Cephes library.
SRM_INLINE float exponential(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer in the lowest bits
  const float shifted = x * 1.44269504f + kToInteger, n = shifted - kToInteger;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f * f + 1.3981999507e-3f;
  p = ((p * f + 8.3334519073e-3f) * f + 4.1665795894e-2f) * f + 1.6666665459e-1f;
  p = (p * f + 5.0000001201e-1f) * f * f + f + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127) << 23);
  return x <= -87.0f ? 0.0f : p * power;
}

SRM_INLINE double hyperbolic_tangent(double x) { return std::tanh(x); }

// Returns tanh(x) with an error of at most 2 ulp, also near 0. The polynomial is from the Cephes library.
SRM_INLINE float hyperbolic_tangent(float x) {
  const float size = std::abs(x), z = x * x, e = exponential(-2.0f * size);
  float p = -5.70498872745e-3f * z + 2.06390887954e-2f;
  p = ((p * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z - 3.33332819422e-1f;
  return size >= 0.625f ? std::copysign((1.0f - e) / (1.0f + e), x) : p * z * x + x;
}

}  // namespace srm
