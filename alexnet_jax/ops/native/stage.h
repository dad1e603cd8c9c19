// Rectifier, normalisation and max pool fused: the intermediate maps stay in a core's cache.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include "normalisation.h"

namespace {

// Where the maps of an image and the windows over them lie, and the rule.
struct Stage {
  Normalisation rule;
  int64_t b, h, w, channels, groups, oh, ow, window, stride;

  Stage(ffi::Span<const int64_t> x, ffi::Span<const int64_t> y, int64_t groups, int64_t size,
        float k, float alpha, int64_t window, int64_t stride)
      : rule{x[3] / groups, size, k, alpha, true}, b(x[0]), h(x[1]), w(x[2]), channels(x[3]),
        groups(groups), oh(y[1]), ow(y[2]), window(window), stride(stride) {}

  // Calls work(first float in x, first in y, maps, scratch) for each group of each image, whose
  // maps are rectified and normalised, (h, w, width).
  template <typename F>
  void ForEachGroup(ffi::ThreadPool& pool, const float* x, const F& work) const {
    Parallel(pool, b * groups, [&](int64_t part) {
      const Memory scratch(rule.scratch() + h * w * rule.width);
      float* maps = scratch + rule.scratch();
      std::memset(scratch, 0, 4 * rule.scratch());
      const int64_t image = part / groups, channel = part % groups * rule.width;
      const int64_t first = image * h * w * channels + channel;
      for (int64_t pixel = 0; pixel < h * w; ++pixel)
        rule.Forward(x + first + pixel * channels, maps + pixel * rule.width, scratch);
      work(first, image * oh * ow * channels + channel, maps, scratch);
    });
  }

  // Calls work(i, j, c, maxima) for each window (i, j) and vector of maps from c on. A NaN is
  // a maximum. From the last window to the first, the order in which XLA sums their gradients.
  template <typename F>
  void ForEachMaximum(const float* maps, const F& work) const {
    for (int64_t i = oh; i-- > 0;)
      for (int64_t j = ow; j-- > 0;)
        for (int64_t c = 0; c < rule.width; c += kLanes) {
          Vec most = Splat(-__builtin_inff());
          auto none = most != most;
          ForEachPixel(i, j, [&](int64_t pixel) {
            const Vec value = Load(maps + pixel * rule.width + c, rule.width - c);
            most = value > most ? value : most;
            none |= value != value;
          });
          work(i, j, c, none ? Splat(__builtin_nanf("")) : most);
        }
  }

  // Calls work(pixel) for each pixel of window (i, j) inside the map, in row-major order.
  template <typename F>
  void ForEachPixel(int64_t i, int64_t j, const F& work) const {
    const int64_t bottom = std::min(i * stride + window, h);
    const int64_t right = std::min(j * stride + window, w);
    for (int64_t row = i * stride; row < bottom; ++row)
      for (int64_t column = j * stride; column < right; ++column) work(row * w + column);
  }
};

ffi::Error StageForward(ffi::ThreadPool pool, Input x, Output y, int64_t groups, int64_t size,
                        float k, float alpha, int64_t window, int64_t stride) {
  const Stage s(x.dimensions(), y->dimensions(), groups, size, k, alpha, window, stride);
  float* result = Fresh(y);
  s.ForEachGroup(pool, x.typed_data(), [&](int64_t, int64_t out, const float* maps, float*) {
    s.ForEachMaximum(maps, [&](int64_t i, int64_t j, int64_t c, Vec most) {
      Store(result + out + (i * s.ow + j) * s.channels + c, most, s.rule.width - c);
    });
  });
  return ffi::Error::Success();
}

// A window's gradient goes to its first maximum, or nowhere if that is NaN.
ffi::Error StageGradient(ffi::ThreadPool pool, Input x, Input dy, Output dx, int64_t groups,
                         int64_t size, float k, float alpha, int64_t window, int64_t stride) {
  const Stage s(x.dimensions(), dy.dimensions(), groups, size, k, alpha, window, stride);
  const int64_t width = s.rule.width, pixels = s.h * s.w;
  float* result = Fresh(dx);
  s.ForEachGroup(pool, x.typed_data(), [&](int64_t in, int64_t out, float* maps, float* scratch) {
    const float *from = x.typed_data() + in, *gradient = dy.typed_data() + out;
    float* to = result + in;
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      std::memset(to + pixel * s.channels, 0, 4 * width);
    s.ForEachMaximum(maps, [&](int64_t i, int64_t j, int64_t c, Vec most) {
      Vec rest = Load(gradient + (i * s.ow + j) * s.channels + c, width - c);
      s.ForEachPixel(i, j, [&](int64_t pixel) {
        const auto here = Load(maps + pixel * width + c, width - c) == most;
        float* sum = to + pixel * s.channels + c;
        Store(sum, Load(sum, width - c) + (here ? rest : Vec{}), width - c);
        rest = here ? Vec{} : rest;
      });
    });
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      float* gradients = to + pixel * s.channels;
      s.rule.Backward(from + pixel * s.channels, gradients, gradients, scratch);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
