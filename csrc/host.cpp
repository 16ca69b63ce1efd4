// The arithmetic of jacobi.h on one thread of the host, for the tests; no part of the installed library.
#include <cstdint>
#include <vector>

#include "jacobi.h"

namespace {

struct Alone {
  static constexpr int kLanes = 1;
  int lane() const { return 0; }
  int group() const { return 0; }
  int groups() const { return 1; }
  bool leader() const { return true; }
  void barrier() const {}
  float sum(float value) const { return value; }
  float from(float value, int) const { return value; }
  void raise(float* at, float value) const {
    if (value > *at) *at = value;
  }
};

}  // namespace

extern "C" void srm_jacobi_solve_host(const float* a, float* x, const uint8_t* wanted, int64_t batch, int r, int d,
                                      int transposed, int keep_all) {
  std::vector<float> rows(r * r), weights(r);
  float widest = 0.0f;
  Alone alone;
  for (int64_t matrix = 0; matrix < batch; ++matrix) {
    if (wanted != nullptr && !wanted[matrix]) continue;
    for (int t = 0; t < r * r; ++t) rows[t] = a[matrix * r * r + (transposed ? t % r * r + t / r : t)];
    srm::pseudo_inverse(alone, rows.data(), x + matrix * r * d, weights.data(), &widest, r, d, keep_all != 0);
  }
}

extern "C" void srm_jacobi_pair(int round, int place, int rows, int* first, int* second) {
  const srm::Pair pair = srm::pair_of(round, place, rows);
  *first = pair.first;
  *second = pair.second;
}
