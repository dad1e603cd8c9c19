// Response normalisation across maps with power 3/4.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include "parallel.h"

namespace {

// x ** -1/2. One Newton step takes an estimate of 14 bits to nearly float32's precision.
inline Vec InverseRoot(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rsqrt14_ps((__m512)x);
  return guess * (1.5f - 0.5f * x * guess * guess);
#else
  Vec root;
  for (int lane = 0; lane < kLanes; ++lane) root[lane] = 1 / __builtin_sqrtf(x[lane]);
  return root;
#endif
}

// The rule, applied to a line: the maps of one group at one pixel.
struct Normalisation {
  int64_t width, size;  // of a line, of its windows
  float k, alpha;
  bool rectify = false;  // max(x, 0) is normalised

  int64_t reach() const { return size / 2; }
  int64_t scratch() const { return 2 * Line(); }  // floats, zeros before the first line

  // y[i] = x[i] s[i] ** -3/4 with the sum s[i] = k + alpha * sum over neighbours j of x[j] ** 2
  void Forward(const float* x, float* y, float* scratch) const {
    Square(x, scratch);
    for (int64_t c = 0; c < width; c += kLanes)
      Store(y + c, Value(x, c) * Power(Root(scratch, c)), width - c);
  }

  // dx[i] = dy[i] s[i] ** -3/4 - 3/2 alpha x[i] * sum over neighbours j of dy[j] x[j] s[j] ** -7/4
  // dx may be dy itself.
  void Backward(const float* x, const float* dy, float* dx, float* scratch) const {
    float* shares = scratch + Line();
    Square(x, scratch);
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec root = Root(scratch, c), direct = Load(dy + c, width - c) * Power(root);
      Store(shares + reach() + c, direct * Value(x, c) * root * root, width - c);
      Store(dx + c, direct, width - c);
    }
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec value = Value(x, c), through = value * Neighbours(shares, c);
      const Vec sum = Load(dx + c, width - c) - 1.5f * alpha * through;
      Store(dx + c, rectify ? (value > Vec{} ? sum : Vec{}) : sum, width - c);
    }
  }

 private:
  int64_t Line() const { return Padded(width + 2 * reach(), kLanes) + kLanes; }

  Vec Value(const float* x, int64_t c) const {
    const Vec value = Load(x + c, width - c);
    return rectify ? (value < Vec{} ? Vec{} : value) : value;  // NaN stays NaN
  }

  void Square(const float* x, float* squares) const {
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec value = Value(x, c);
      Store(squares + reach() + c, value * value, width - c);
    }
  }

  // The sums over neighbours of a line, which has zeros on both sides.
  Vec Neighbours(const float* line, int64_t c) const {
    Vec sum = Load(line + c);
    for (int64_t i = 1; i <= 2 * reach(); ++i) sum += Load(line + c + i);
    return sum;
  }

  // (k + alpha * sum of squares) ** -1/2
  Vec Root(const float* squares, int64_t c) const {
    return InverseRoot(k + alpha * Neighbours(squares, c));
  }
  static Vec Power(Vec root) { return root * root * InverseRoot(root); }
};

// Calls work(first float, scratch) for each line.
template <typename F>
void ForEachLine(ffi::ThreadPool& pool, const Normalisation& n, int64_t lines, const F& work) {
  constexpr int64_t kLines = 128;  // of a part
  Parallel(pool, Parts(lines, kLines), [&](int64_t part) {
    const Memory scratch(n.scratch());
    std::memset(scratch, 0, 4 * n.scratch());
    const int64_t last = std::min((part + 1) * kLines, lines);
    for (int64_t line = part * kLines; line < last; ++line) work(line * n.width, scratch);
  });
}

ffi::Error Normalise(ffi::ThreadPool pool, Input x, Output y, int64_t groups, int64_t size, float k,
                     float alpha) {
  const Normalisation n{x.dimensions().back() / groups, size, k, alpha};
  const float* from = x.typed_data();
  float* to = Fresh(y);
  ForEachLine(pool, n, x.element_count() / n.width, [&](int64_t first, float* scratch) {
    n.Forward(from + first, to + first, scratch);
  });
  return ffi::Error::Success();
}

ffi::Error NormaliseGradient(ffi::ThreadPool pool, Input x, Input dy, Output dx, int64_t groups,
                             int64_t size, float k, float alpha) {
  const Normalisation n{x.dimensions().back() / groups, size, k, alpha};
  const float *from = x.typed_data(), *gradient = dy.typed_data();
  float* to = Fresh(dx);
  ForEachLine(pool, n, x.element_count() / n.width, [&](int64_t first, float* scratch) {
    n.Backward(from + first, gradient + first, to + first, scratch);
  });
  return ffi::Error::Success();
}

}  // namespace
