// Products of a fully connected layer, for few rows and weights too large for any cache.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include "parallel.h"
#include "products.h"

namespace {

void Transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to,
               int64_t to_pitch) {
  constexpr int64_t kBlock = 16;
  for (int64_t i = 0; i < rows; i += kBlock)
    for (int64_t j = 0; j < columns; j += kBlock)
      for (int64_t column = j; column < std::min(j + kBlock, columns); ++column)
        for (int64_t row = i; row < std::min(i + kBlock, rows); ++row)
          to[column * to_pitch + row] = from[row * from_pitch + column];
}

constexpr int kPanel = 2;  // vectors of a panel
constexpr int64_t kPanelWidth = kPanel * kLanes;

// y (b, out) = x (b, in) * weights (in, out). Weights are read once, in packed blocks for all rows.
ffi::Error Dense(ffi::ThreadPool pool, Input x, Input weights, Output y) {
  constexpr int64_t kColumns = 8 * kPanelWidth, kDeep = 64;
  const int64_t b = x.dimensions()[0], in = x.dimensions()[1], out = weights.dimensions()[1];
  const float *from = x.typed_data(), *w = weights.typed_data();
  Parallel(pool, Parts(out, kColumns), [&](int64_t part) {
    const int64_t first = part * kColumns, columns = std::min(kColumns, out - first);
    const Memory packed(kDeep * kColumns), sums(b * kColumns);
    for (int64_t k = 0; k == 0 || k < in; k += kDeep) {  // if empty, zeros
      const int64_t deep = std::min(kDeep, in - k);
      Pack(w + k * out + first, out, deep, columns, kPanelWidth, packed);
      for (int64_t c = 0; c < columns; c += kPanelWidth)
        Rows<kPanel>(b, {from + k, in, 1, 0}, {packed + c * deep, kPanelWidth}, 1, deep, sums + c,
                     kColumns, k > 0);
    }
    for (int64_t i = 0; i < b; ++i)
      std::memcpy(y->typed_data() + i * out + first, sums + i * kColumns, 4 * columns);
  });
  return ffi::Error::Success();
}

// dx (b, in) = dy (b, out) * weights (in, out) transposed; computed as its transpose.
ffi::Error DenseInput(ffi::ThreadPool pool, Input dy, Input weights, Output dx) {
  constexpr int64_t kSome = 4 * kRows<kPanel>, kDeep = 512;
  const int64_t b = dy.dimensions()[0], out = dy.dimensions()[1], in = weights.dimensions()[0];
  const int64_t columns = Padded(b, kPanelWidth);
  const float* w = weights.typed_data();
  const Memory turned(out * b), packed(out * columns);
  const int64_t pieces = Parts(out, kDeep);
  Parallel(pool, pieces, [&](int64_t part) {
    const int64_t k = part * kDeep, deep = std::min(kDeep, out - k);
    Transpose(dy.typed_data() + k, out, b, deep, turned + k * b, b);
    Pack(turned + k * b, b, deep, b, kPanelWidth, packed + k * columns);
  });
  Parallel(pool, Parts(in, kSome), [&](int64_t part) {
    const int64_t first = part * kSome, rows = std::min(kSome, in - first);
    const Memory sums(kSome * columns);
    for (int64_t k = 0; k == 0 || k < out; k += kDeep) {  // if empty, zeros
      const int64_t deep = std::min(kDeep, out - k);
      for (int64_t some = 0; some < rows; some += kRows<kPanel>)
        for (int64_t c = 0; c < columns; c += kPanelWidth)
          Rows<kPanel>(std::min<int64_t>(kRows<kPanel>, rows - some),
                       {w + (first + some) * out + k, out, 1, 0},
                       {packed + k * columns + c * deep, kPanelWidth}, 1, deep,
                       sums + some * columns + c, columns, k > 0);
    }
    Transpose(sums, columns, rows, b, dx->typed_data() + first, in);
  });
  return ffi::Error::Success();
}

// dw (in, out) = x (b, in) transposed * dy (b, out).
ffi::Error DenseWeights(ffi::ThreadPool pool, Input x, Input dy, Output dw) {
  constexpr int64_t kSome = 8 * kRows<kPanel>, kColumns = 8 * kPanelWidth, kDeep = 128;
  const int64_t b = x.dimensions()[0], in = x.dimensions()[1], out = dy.dimensions()[1];
  const Memory packed(b * Padded(out, kPanelWidth));
  Parallel(pool, Parts(out, kPanelWidth), [&](int64_t part) {
    const int64_t first = part * kPanelWidth, columns = std::min(kPanelWidth, out - first);
    Pack(dy.typed_data() + first, out, b, columns, kPanelWidth, packed + first * b);
  });
  float* to = Fresh(dw);
  Parallel(pool, Parts(in, kSome), [&](int64_t part) {
    const int64_t first = part * kSome, rows = std::min(kSome, in - first);
    const Memory turned(kSome * b), sums(kSome * kColumns);
    Transpose(x.typed_data() + first, in, b, rows, turned, b);
    for (int64_t column = 0; column < out; column += kColumns) {
      const int64_t columns = std::min(kColumns, out - column);
      for (int64_t k = 0; k == 0 || k < b; k += kDeep) {  // if empty, zeros
        const int64_t deep = std::min(kDeep, b - k);
        for (int64_t c = 0; c < columns; c += kPanelWidth)
          Rows<kPanel>(rows, {turned + k, b, 1, 0},
                       {packed + (column + c) * b + k * kPanelWidth, kPanelWidth}, 1, deep,
                       sums + c, kColumns, k > 0);
      }
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(to + (first + row) * out + column, sums + row * kColumns, 4 * columns);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
