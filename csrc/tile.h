// softmax_pool processes one head of one tile of the fused neck (srm_kernels/neck/tiled.py). It computes the softmax
// over the landmarks, which gives probabilities. Pooling divides a map into P×P cells, and averages the probabilities
// over each cell. softmax_pool adds the contribution of its tile to these averages. softmax_pool_backward is the
// backward pass of softmax_pool. cell_means averages one channel of a whole map over each cell.
//
// A map has height × width positions, in row-major order. A tile contains the positions from start to stop − 1. The
// variable size is P. Cell (i, j) contains the map rows from ⌊i·height/P⌋ to ⌈(i + 1)·height/P⌉ − 1. Its columns follow
// from j and width in the same way. Neighbouring cells can overlap, so a position can be in several cells.
#pragma once

#include <algorithm>
#include <cstdint>

#include "elementary.h"

namespace srm {

struct Tile {
  int64_t height, width, size, start, stop;
};

struct Cells {  // cells along one axis
  int64_t length, size;
  SRM_INLINE int64_t begin(int64_t cell) const { return cell * length / size; }
  SRM_INLINE int64_t end(int64_t cell) const { return ((cell + 1) * length + size - 1) / size; }
  SRM_INLINE int64_t first(int64_t at) const {  // the first cell that contains a position
    int64_t cell = at * size / length;
    while (cell > 0 && end(cell - 1) > at) --cell;
    while (end(cell) <= at) ++cell;
    return cell;
  }
  SRM_INLINE bool contains(int64_t cell, int64_t at) const { return cell < size && begin(cell) <= at; }
};

constexpr int64_t kBlock = 16;  // rows of logits processed together, to overlap their long dependency chains

// Replaces the logits (rows×r) by exp(logit − row maximum), and writes 1 / row sum to factors (rows). rows ≤ kBlock.
template <class T>
SRM_INLINE void exponentials(T* logits, T* factors, int64_t rows, int64_t r) {
  for (int64_t q = 0; q < rows; ++q) {
    const T* row = logits + q * r;
    T most = row[0];
#pragma omp simd reduction(max : most)
    for (int64_t c = 0; c < r; ++c) most = row[c] > most ? row[c] : most;
    factors[q] = most;
  }
  for (int64_t q = 0; q < rows; ++q) {
    T* row = logits + q * r;
    const T most = factors[q];
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < r; ++c) sum += row[c] = exponential(row[c] - most);
    factors[q] = 1 / sum;
  }
}

template <class T>
SRM_INLINE void scale(T* row, T factor, int64_t r) {
#pragma omp simd
  for (int64_t c = 0; c < r; ++c) row[c] *= factor;
}

template <class T>
SRM_INLINE void add(T* __restrict into, const T* __restrict from, T factor, int64_t r) {
#pragma omp simd
  for (int64_t c = 0; c < r; ++c) into[c] += factor * from[c];
}

// Splits the tile by map rows, and calls call(y, left, right, row) for each part. The part contains the columns from
// left to right − 1 of map row y. row points to the logits of the part's first position.
template <class T, class Call>
SRM_INLINE void by_rows(T* logits, int64_t r, const Tile& tile, Call call) {
  for (int64_t at = tile.start; at < tile.stop;) {
    const int64_t y = at / tile.width, left = at % tile.width;
    const int64_t right = std::min(tile.width, left + tile.stop - at);
    call(y, left, right, logits + (at - tile.start) * r);
    at += right - left;
  }
}

// Replaces the logits (M×r) of the tile's M positions by their softmax. pooled (P×P×r) accumulates the cell means over
// the tiles of a map: the function adds the contribution of its tile. work is scratch memory of P·r numbers.
template <class T>
SRM_INLINE void softmax_pool(T* logits, T* pooled, T* work, int64_t r, const Tile& tile) {
  const Cells rows{tile.height, tile.size}, columns{tile.width, tile.size};
  by_rows(logits, r, tile, [&](int64_t y, int64_t left, int64_t right, T* row) __attribute__((always_inline)) {
    const int64_t first = columns.first(left);
    std::fill(work + first * r, work + tile.size * r, T(0));
    int64_t cell = first, last = first;
    T factors[kBlock];
    for (int64_t x = left; x < right; ++x, row += r) {
      const int64_t place = (x - left) % kBlock;
      if (place == 0) exponentials(row, factors, std::min(kBlock, right - x), r);
      scale(row, factors[place], r);
      while (columns.end(cell) <= x) ++cell;
      for (last = cell; columns.contains(last, x); ++last) add(work + last * r, row, T(1), r);
    }
    for (int64_t i = rows.first(y); rows.contains(i, y); ++i)
      for (int64_t j = first; j < last; ++j) {
        const T count = static_cast<T>((rows.end(i) - rows.begin(i)) * (columns.end(j) - columns.begin(j)));
        add(pooled + (i * tile.size + j) * r, work + j * r, 1 / count, r);
      }
  });
}

// Replaces the logits (M×r) by the gradient of the logits. pooled (P×P×r) is the gradient of the cell means. work is
// scratch memory of (P + 1)·r numbers.
template <class T>
SRM_INLINE void softmax_pool_backward(T* logits, const T* pooled, T* work, int64_t r, const Tile& tile) {
  const Cells rows{tile.height, tile.size}, columns{tile.width, tile.size};
  T* const several = work + tile.size * r;
  by_rows(logits, r, tile, [&](int64_t y, int64_t left, int64_t right, T* row) __attribute__((always_inline)) {
    const int64_t first = columns.first(left);
    for (int64_t j = first; columns.contains(j, right - 1); ++j) {
      std::fill(work + j * r, work + (j + 1) * r, T(0));
      for (int64_t i = rows.first(y); rows.contains(i, y); ++i) {
        const T count = static_cast<T>((rows.end(i) - rows.begin(i)) * (columns.end(j) - columns.begin(j)));
        add(work + j * r, pooled + (i * tile.size + j) * r, 1 / count, r);
      }
    }
    int64_t cell = first;
    T factors[kBlock];
    for (int64_t x = left; x < right; ++x, row += r) {
      const int64_t place = (x - left) % kBlock;
      if (place == 0) exponentials(row, factors, std::min(kBlock, right - x), r);
      while (columns.end(cell) <= x) ++cell;
      const T* grad = work + cell * r;
      if (columns.contains(cell + 1, x)) {
        std::copy(grad, grad + r, several);
        for (int64_t j = cell + 1; columns.contains(j, x); ++j) add(several, work + j * r, T(1), r);
        grad = several;
      }
      scale(row, factors[place], r);
      T along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t c = 0; c < r; ++c) along += row[c] * grad[c];
#pragma omp simd
      for (int64_t c = 0; c < r; ++c) row[c] *= grad[c] - along;
    }
  });
}

// Writes the cell means (P×P) of one channel (height × width) to means. work is scratch memory of width numbers.
template <class T>
SRM_INLINE void cell_means(const T* channel, T* means, T* work, int64_t height, int64_t width, int64_t size) {
  const Cells rows{height, size}, columns{width, size};
  for (int64_t i = 0; i < size; ++i) {
    std::fill(work, work + width, T(0));
    for (int64_t y = rows.begin(i); y < rows.end(i); ++y) add(work, channel + y * width, T(1), width);
    for (int64_t j = 0; j < size; ++j) {
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t x = columns.begin(j); x < columns.end(j); ++x) sum += work[x];
      const int64_t count = (rows.end(i) - rows.begin(i)) * (columns.end(j) - columns.begin(j));
      means[i * size + j] = sum / static_cast<T>(count);
    }
  }
}

}  // namespace srm
