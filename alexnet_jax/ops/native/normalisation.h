// Response normalisation across maps with power 3/4.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include "parallel.h"

namespace {

// x ** -1/2. From an estimate of 14 bits, one of Newton's steps makes nearly all of float32's.
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

// Where the maps of pixels lie, and the rule.
struct Normalisation {
  int64_t pixels = 1, channels, groups, size;
  float k, alpha;

  static constexpr int64_t kPixels = 64;  // of a part

  Normalisation(ffi::Span<const int64_t> x, int64_t groups, int64_t size, float k, float alpha)
      : channels(x.back()), groups(groups), size(size), k(k), alpha(alpha) {
    for (const int64_t side : x.first(x.size() - 1)) pixels *= side;
  }

  int64_t width() const { return channels / groups; }
  int64_t reach() const { return size / 2; }

  // The sums over neighbours of a line of a group's maps, which has zeros on both sides.
  Vec Neighbours(const float* line, int64_t c) const {
    Vec sum = Load(line + c);
    for (int64_t i = 1; i <= 2 * reach(); ++i) sum += Load(line + c + i);
    return sum;
  }

  // (k + alpha * sum of squares) ** -1/2, from a line of them.
  Vec Root(const float* squares, int64_t c) const {
    return InverseRoot(k + alpha * Neighbours(squares, c));
  }

  // Calls work(first float, line of squares, another line of zeros) for each pixel's groups.
  template <typename F>
  void ForEach(ffi::ThreadPool& pool, const float* x, const F& work) const {
    const int64_t line = Padded(width() + 2 * reach(), kLanes) + kLanes;
    Parallel(pool, Parts(pixels, kPixels), [&](int64_t part) {
      const Memory lines(2 * line);
      std::memset(lines, 0, 8 * line);
      const int64_t last = std::min((part + 1) * kPixels, pixels) * groups;
      for (int64_t p = part * kPixels * groups; p < last; ++p) {
        const float* from = x + p * width();
        for (int64_t c = 0; c < width(); c += kLanes) {
          const Vec value = Load(from + c, width() - c);
          Store(lines + reach() + c, value * value, width() - c);
        }
        work(p * width(), static_cast<float*>(lines), lines + line);
      }
    });
  }
};

ffi::Error Normalise(ffi::ThreadPool pool, Input x, Output y, int64_t groups, int64_t size, float k,
                     float alpha) {
  const Normalisation n(x.dimensions(), groups, size, k, alpha);
  float* result = Fresh(y);
  n.ForEach(pool, x.typed_data(), [&](int64_t first, const float* squares, float*) {
    for (int64_t c = 0; c < n.width(); c += kLanes) {
      const int64_t count = n.width() - c;
      const Vec root = n.Root(squares, c), power = root * root * InverseRoot(root);
      Store(result + first + c, Load(x.typed_data() + first + c, count) * power, count);
    }
  });
  return ffi::Error::Success();
}

// dx[i] = dy[i] s[i] ** -3/4 - 3/2 alpha x[i] * sum over neighbours j of dy[j] x[j] s[j] ** -7/4
ffi::Error NormaliseGradient(ffi::ThreadPool pool, Input x, Input dy, Output dx, int64_t groups,
                             int64_t size, float k, float alpha) {
  const Normalisation n(x.dimensions(), groups, size, k, alpha);
  float* result = Fresh(dx);
  n.ForEach(pool, x.typed_data(), [&](int64_t first, const float* squares, float* shares) {
    const float* from = x.typed_data() + first;
    float* to = result + first;
    for (int64_t c = 0; c < n.width(); c += kLanes) {
      const int64_t count = n.width() - c;
      const Vec root = n.Root(squares, c), power = root * root * InverseRoot(root);
      const Vec direct = Load(dy.typed_data() + first + c, count) * power;
      const Vec share = direct * Load(from + c, count) * root * root;
      Store(shares + n.reach() + c, share, count);
      Store(to + c, direct, count);
    }
    for (int64_t c = 0; c < n.width(); c += kLanes) {
      const int64_t count = n.width() - c;
      const Vec sum = Load(from + c, count) * n.Neighbours(shares, c);
      Store(to + c, Load(to + c, count) - 1.5f * alpha * sum, count);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
