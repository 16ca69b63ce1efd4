// A⁺ G of one matrix by one-sided Jacobi rotations: the rows of A are turned in pairs until they are orthogonal, and
// those of G with them. Then A is Σ Vᵀ and G is Uᵀ G, and X = V Σ⁻² (Σ Uᵀ G).
//
// `Team` is who works on the matrix: a thread block (jacobi.cu), or one thread on the host (host.cpp), so that the
// arithmetic that runs on a GPU is the arithmetic the tests run. One barrier a round, one more to end a sweep.
#pragma once

#ifdef __CUDACC__
#define SRM_ANY __host__ __device__ inline
#else
#define SRM_ANY inline
#include <cmath>
#endif

namespace srm {

constexpr int kLargest = 128;   // r; d is free
constexpr int kSweeps = 20;
constexpr float kEps = 1.1920929e-07f;
constexpr float kOrthogonal = 1e-5f;  // quadratic convergence takes a sweep that met no more than this below kEps

struct Pair {
  int first, second;
};

// Pair `s` of round `t` of a round-robin tournament of n rows, n even: n − 1 rounds, every pair once.
SRM_ANY Pair pair_of(int t, int s, int n) {
  const int first = s == 0 ? 0 : 1 + (s - 1 + t) % (n - 1);
  return {first, 1 + (n - 2 - s + t) % (n - 1)};
}

struct Rotation {
  float c, s, cosine;
};

// The rotation that makes two rows orthogonal, from their squared norms and inner product.
SRM_ANY Rotation rotation_of(float aa, float bb, float ab) {
  const float product = aa * bb;
  const float cosine = fabsf(ab) / sqrtf(product > 1e-37f ? product : 1e-37f);
  if (!(cosine > kEps)) return {1.0f, 0.0f, cosine};
  const float zeta = (bb - aa) / (2.0f * ab);
  const float tangent = copysignf(1.0f, zeta) / (fabsf(zeta) + sqrtf(1.0f + zeta * zeta));
  const float c = 1.0f / sqrtf(1.0f + tangent * tangent);
  return {c, c * tangent, cosine};
}

// rows (r×r) holds A, x (r×d) holds G and takes X; weights (r) and widest (1) are scratch; all of them are shared by
// the team. Where not `keep_all`, singular values up to r·eps·σ_max are dropped.
template <class Team>
SRM_ANY void pseudo_inverse(Team& team, float* rows, float* x, float* weights, float* widest, int r, int d,
                            bool keep_all) {
  constexpr int kLanes = Team::kLanes;
  constexpr int kEach = kLargest / kLanes;  // rows or columns a lane holds
  const int n = r + (r & 1);
  float met = 1.0f;
  for (int sweep = 0; sweep < kSweeps && met > kOrthogonal; ++sweep) {
    if (team.leader()) *widest = 0.0f;
    team.barrier();
    for (int t = 0; t < n - 1; ++t) {
      for (int s = team.group(); s < n / 2; s += team.groups()) {
        const Pair p = pair_of(t, s, n);
        if (p.first >= r || p.second >= r) continue;  // an odd row rests
        float* a = rows + p.first * r;
        float* b = rows + p.second * r;
        float aa = 0.0f, bb = 0.0f, ab = 0.0f;
        for (int c = team.lane(); c < r; c += kLanes) {
          aa += a[c] * a[c];
          bb += b[c] * b[c];
          ab += a[c] * b[c];
        }
        const Rotation q = rotation_of(team.sum(aa), team.sum(bb), team.sum(ab));
        if (q.s != 0.0f) {
          for (int c = team.lane(); c < r; c += kLanes) {
            const float u = a[c], v = b[c];
            a[c] = q.c * u - q.s * v;
            b[c] = q.s * u + q.c * v;
          }
          float* g = x + p.first * d;
          float* h = x + p.second * d;
          for (int c = team.lane(); c < d; c += kLanes) {
            const float u = g[c], v = h[c];
            g[c] = q.c * u - q.s * v;
            h[c] = q.s * u + q.c * v;
          }
        }
        if (team.lane() == 0) team.raise(widest, q.cosine);
      }
      team.barrier();
    }
    met = *widest;
    team.barrier();
  }
  for (int i = team.group(); i < r; i += team.groups()) {
    float square = 0.0f;
    for (int c = team.lane(); c < r; c += kLanes) square += rows[i * r + c] * rows[i * r + c];
    square = team.sum(square);
    if (team.lane() == 0) weights[i] = square;
  }
  team.barrier();
  float largest = 0.0f;
  for (int i = 0; i < r; ++i) largest = weights[i] > largest ? weights[i] : largest;
  const float relative = keep_all ? 0.0f : r * kEps;
  const float limit = relative * relative * largest;
  for (int e = team.group(); e < d; e += team.groups()) {  // a column of X reads that column of UᵀG alone
    float held[kEach], result[kEach];
    for (int q = 0; q < kEach; ++q) {
      const int i = q * kLanes + team.lane();
      held[q] = i < r && weights[i] > limit ? x[i * d + e] / weights[i] : 0.0f;
      result[q] = 0.0f;
    }
    for (int q = 0; q < kEach; ++q) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int i = q * kLanes + lane;
        if (i >= r) break;
        const float factor = team.from(held[q], lane);
        for (int p = 0; p < kEach; ++p) {
          const int c = p * kLanes + team.lane();
          if (c < r) result[p] += rows[i * r + c] * factor;
        }
      }
    }
    for (int q = 0; q < kEach; ++q) {
      const int c = q * kLanes + team.lane();
      if (c < r) x[c * d + e] = result[q];
    }
  }
}

}  // namespace srm
