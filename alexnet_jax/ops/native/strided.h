// A convolution of one group with any stride, for few channels: a row of the kernel covers a
// contiguous run of pixels, so that windows need not be copied.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include "parallel.h"
#include "products.h"

namespace {

// Where the windows of an image lie.
struct Windows {
  int64_t h, w, in, oh, ow, out, kh, run, stride, top, left;
  int64_t tall, pitch;  // of a padded image: rows, floats of a row

  Windows(ffi::Span<const int64_t> x, ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> y,
          int64_t stride, int64_t top, int64_t left)
      : h(x[1]), w(x[2]), in(x[3]), oh(y[1]), ow(y[2]), out(y[3]), kh(kernel[0]),
        run(kernel[1] * in), stride(stride), top(top), left(left),
        tall((oh - 1) * stride + kh), pitch((ow - 1) * stride * in + run) {}

  // Copies what windows cover of an image, zeros where they overhang: (tall, pitch).
  void Surround(const float* image, float* to) const {
    std::memset(to, 0, 4 * tall * pitch);
    const int64_t first = std::max<int64_t>(0, -left * in);
    const int64_t columns = std::min(w * in, pitch - left * in) - first;
    if (columns <= 0) return;
    for (int64_t i = std::max<int64_t>(0, -top); i < std::min(h, tall - top); ++i)
      std::memcpy(to + (i + top) * pitch + left * in + first, image + i * w * in + first,
                  4 * columns);
  }
};

template <int V>
void StridedOutputs(ffi::ThreadPool& pool, const float* x, const float* kernel, float* y,
                    int64_t b, const Windows& s) {
  constexpr int64_t kWidth = V * kLanes;
  const int64_t panels = Parts(s.out, kWidth), depth = s.kh * s.run;
  const Memory packed(panels * depth * kWidth);
  Pack(kernel, s.out, depth, s.out, kWidth, packed);
  Parallel(pool, b, [&](int64_t image) {
    const Memory scratch(s.tall * s.pitch + s.ow * kWidth);
    float* line = scratch + s.tall * s.pitch;  // of outputs
    s.Surround(x + image * s.h * s.w * s.in, scratch);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = panel * kWidth, count = std::min(kWidth, s.out - column);
      for (int64_t i = 0; i < s.oh; ++i) {
        float* to = y + (image * s.oh + i) * s.ow * s.out + column;
        const bool whole = count == kWidth;
        Rows<V>(s.ow, {scratch + i * s.stride * s.pitch, s.stride * s.in, 1, s.pitch},
                {packed + panel * depth * kWidth, kWidth}, s.kh, s.run, whole ? to : line,
                whole ? s.out : kWidth, false);
        for (int64_t j = 0; !whole && j < s.ow; ++j)
          std::memcpy(to + j * s.out, line + j * kWidth, 4 * count);
      }
    }
  });
}

template <int V>
void StridedSums(ffi::ThreadPool& pool, const float* x, const float* dy, float* dkernel,
                 int64_t b, const Windows& s) {
  constexpr int64_t kWidth = V * kLanes;
  const int64_t columns = Padded(s.out, kWidth), depth = s.kh * s.run;
  const int64_t parts = std::min<int64_t>(b, 16), places = s.oh * s.ow;
  const Memory sums(parts * depth * columns);
  Parallel(pool, parts, [&](int64_t part) {
    const Memory pixels(s.tall * s.pitch), gradients(places * columns);
    float* sum = sums + part * depth * columns;
    std::memset(sum, 0, 4 * depth * columns);
    for (int64_t image = b * part / parts; image < b * (part + 1) / parts; ++image) {
      s.Surround(x + image * s.h * s.w * s.in, pixels);
      Pack(dy + image * places * s.out, s.out, places, s.out, kWidth, gradients);
      for (int64_t column = 0; column < columns; column += kWidth)
        for (int64_t i = 0; i < s.kh; ++i)
          Rows<V>(s.run, {pixels + i * s.pitch, 1, s.stride * s.in, s.stride * s.pitch},
                  {gradients + column * places, kWidth}, s.oh, s.ow,
                  sum + i * s.run * columns + column, columns, true);
    }
  });
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t o = 0; o < s.out; o += kLanes) {
      Vec total{};
      for (int64_t part = 0; part < parts; ++part)
        total += Load(sums + (part * depth + k) * columns + o);
      Store(dkernel + k * s.out + o, total, s.out - o);
    }
}

ffi::Error Strided(ffi::ThreadPool pool, Input x, Input kernel, Output y, int64_t stride,
                   int64_t top, int64_t left) {
  const Windows s(x.dimensions(), kernel.dimensions(), y->dimensions(), stride, top, left);
  WithPanels(s.out, [&](auto v) {
    StridedOutputs<v()>(pool, x.typed_data(), kernel.typed_data(), Fresh(y), x.dimensions()[0], s);
  });
  return ffi::Error::Success();
}

ffi::Error StridedWeights(ffi::ThreadPool pool, Input x, Input dy, Output dkernel, int64_t stride,
                          int64_t top, int64_t left) {
  const Windows s(x.dimensions(), dkernel->dimensions(), dy.dimensions(), stride, top, left);
  WithPanels(s.out, [&](auto v) {
    StridedSums<v()>(pool, x.typed_data(), dy.typed_data(), Fresh(dkernel),
                     x.dimensions()[0], s);
  });
  return ffi::Error::Success();
}

}  // namespace
