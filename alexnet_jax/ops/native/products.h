// Matrix products of operands with any strides in memory, with sums in registers.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>
#include "vectors.h"

namespace {

// Rows of V vectors of a product that fit in registers, beside the operands.
template <int V>
constexpr int kRows = (kRegisters - 4) / V;

// Where a product's left factor lies: element (row, k) of run s at row * .row + k * .k + s * .run.
struct Left {
  const float* data;
  int64_t row, k, run;
};
struct Right {
  const float* data;
  int64_t k;  // from one k to the next, also from run to run
};

// c (R rows of V vectors) = left * right, summed over `runs` runs of `count` each. With
// `add` the finished sum is added to c, since sums of sums round less than one long sum.
template <int R, int V>
void Product(Left left, Right right, int64_t runs, int64_t count, float* c, int64_t c_row,
             bool add) {
  Vec sum[R][V]{};  // in registers only if all loops over it are unrolled (clang 22)
  const float* b = right.data;
  for (int64_t run = 0; run < runs; ++run) {
    const float* a = left.data + run * left.run;
    for (int64_t k = 0; k < count; ++k, a += left.k, b += right.k) {
      Vec column[V];
      for (int v = 0; v < V; ++v) {
        column[v] = Load(b + v * kLanes);
        __builtin_prefetch(b + v * kLanes + 16 * right.k);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec row = Splat(a[r * left.row]);
        for (int v = 0; v < V; ++v) sum[r][v] += row * column[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_row + v * kLanes;
      Store(to, add ? Load(to) + sum[r][v] : sum[r][v]);
    }
}

using ProductOfRows = void (*)(Left, Right, int64_t, int64_t, float*, int64_t, bool);

template <int V, int... R>
constexpr std::array<ProductOfRows, sizeof...(R)> ProductsOf(std::integer_sequence<int, R...>) {
  return {Product<R + 1, V>...};
}

// The product of any number of rows, in groups as equal as can be.
template <int V>
void Rows(int64_t rows, Left left, Right right, int64_t runs, int64_t count, float* c,
          int64_t c_row, bool add) {
  static constexpr auto kProducts = ProductsOf<V>(std::make_integer_sequence<int, kRows<V>>());
  const int64_t groups = Parts(rows, kRows<V>);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = rows * group / groups, last = rows * (group + 1) / groups;
    Left part = left;
    part.data += first * left.row;
    kProducts[last - first - 1](part, right, runs, count, c + first * c_row, c_row, add);
  }
}

// Columns are padded to whole panels of V vectors: calls `call` with the V that pads least.
template <typename F>
void WithPanels(int64_t columns, const F& call) {
  if (Padded(columns, 3 * kLanes) < Padded(columns, 2 * kLanes))
    call(std::integral_constant<int, 3>());
  else
    call(std::integral_constant<int, 2>());
}

// Copies `rows` of `count` floats into panels of `width`, row after row, zeros beyond `count`.
void Pack(const float* from, int64_t pitch, int64_t rows, int64_t count, int64_t width, float* to) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < count; column += width)
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t left = std::max<int64_t>(0, count - column - c);
        Store(to + column * rows + row * width + c,
              left ? Load(from + row * pitch + column + c, left) : Vec{});
      }
}

}  // namespace
