// 3x3 and 5x5 kernels with stride 1 use Winograd's algorithm in two dimensions (Lavin and
// Gray, 2015, arXiv:1509.09308). A line of 6 pixels and a kernel line of r give m = 7 - r outputs
// with 6 products: seen as polynomials, the kernel and the gradient of the outputs are evaluated at
// six points. So F(4, 3) and F(2, 5) share everything but r. The points are 0, +-sqrt(1/2),
// +-sqrt(2) and infinity, whose rounding errors are a third of those of 0, +-1, +-2.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include "parallel.h"
#include "products.h"

namespace {

constexpr int kSide = 6;  // of a tile of pixels
constexpr int kPlaces = kSide * kSide;

// The points p of the pairs p and -p, and their squares.
constexpr float kPoint[2] = {0.70710678118654752f, 1.41421356237309505f}, kSquare[2] = {0.5f, 2};

constexpr float Power(int point, int exponent) {
  float power = exponent % 2 ? kPoint[point] : 1;
  for (int i = 1; i < exponent; i += 2) power *= kSquare[point];
  return power;
}

// A polynomial of N coefficients at 0, p, -p, q, -q and infinity.
template <int N>
struct Evaluate {
  static inline __attribute__((always_inline)) void Line(const Vec* in, Vec* out) {
    out[0] = in[0];
#pragma GCC unroll 36
    for (int point = 0; point < 2; ++point) {
      Vec even = in[0], odd = Power(point, 1) * in[1];
#pragma GCC unroll 36
      for (int i = 2; i < N; ++i) (i % 2 ? odd : even) += Power(point, i) * in[i];
      out[2 * point + 1] = even + odd;
      out[2 * point + 2] = even - odd;
    }
    out[5] = in[N - 1];
  }
  static constexpr int kIn = N, kOut = kSide;
};

// The transpose of Evaluate.
template <int N>
struct Collect {
  static inline __attribute__((always_inline)) void Line(const Vec* in, Vec* out) {
    const Vec even[2] = {in[1] + in[2], in[3] + in[4]}, odd[2] = {in[1] - in[2], in[3] - in[4]};
#pragma GCC unroll 36
    for (int i = 0; i < N; ++i) {
      const Vec* both = i % 2 ? odd : even;
      out[i] = Power(0, i) * both[0] + Power(1, i) * both[1];
    }
    out[0] += in[0];
    out[N - 1] += in[5];
  }
  static constexpr int kIn = kSide, kOut = N;
};

// Transforms six pixels for their products with a kernel's values at the six points.
struct Pixels {
  static inline __attribute__((always_inline)) void Line(const Vec* in, Vec* out) {
    constexpr float kSum = kSquare[0] + kSquare[1], kProduct = kSquare[0] * kSquare[1];
    out[0] = kProduct * in[0] - kSum * in[2] + in[4];
#pragma GCC unroll 36
    for (int point = 0; point < 2; ++point) {
      const Vec even = in[4] - kSquare[1 - point] * in[2];
      const Vec odd = kPoint[point] * (in[3] - kSquare[1 - point] * in[1]);
      out[2 * point + 1] = even + odd;
      out[2 * point + 2] = even - odd;
    }
    out[5] = kProduct * in[1] - kSum * in[3] + in[5];
  }
  static constexpr int kIn = kSide, kOut = kSide;
};

// One of these along both axes: (kIn, kIn) -> (kOut, kOut).
template <typename T>
inline __attribute__((always_inline)) void Both(const Vec* in, Vec* out) {
  Vec half[T::kOut * T::kIn];
#pragma GCC unroll 36
  for (int j = 0; j < T::kIn; ++j) {
    Vec from[T::kIn], to[T::kOut];
#pragma GCC unroll 36
    for (int i = 0; i < T::kIn; ++i) from[i] = in[i * T::kIn + j];
    T::Line(from, to);
#pragma GCC unroll 36
    for (int i = 0; i < T::kOut; ++i) half[i * T::kIn + j] = to[i];
  }
#pragma GCC unroll 36
  for (int i = 0; i < T::kOut; ++i) T::Line(half + i * T::kIn, out + i * T::kOut);
}

// Factors on a kernel's values that make the product that of the polynomials.
constexpr float kScale[kSide] = {1, -2.f / 3, -2.f / 3, 1.f / 6, 1.f / 6, 1};

// A convolution with stride 1, seen as tiles; a group's channels are contiguous.
struct Tiling {
  int64_t b, h, w, in;   // of the input, channels of one group
  int64_t oh, ow, out;   // of the output
  int64_t groups, top, left, side;  // side: m, of a tile's output
  int64_t tall, wide;    // tiles of an image

  Tiling(ffi::Span<const int64_t> x, ffi::Span<const int64_t> y, int64_t groups, int64_t top,
         int64_t left, int64_t side)
      : b(x[0]), h(x[1]), w(x[2]), in(x[3] / groups), oh(y[1]), ow(y[2]), out(y[3] / groups),
        groups(groups), top(top), left(left), side(side), tall(Parts(oh, side)),
        wide(Parts(ow, side)) {}
  int64_t tiles() const { return b * tall * wide; }

  // Where a tile begins in the output.
  struct Place {
    int64_t image, y, x;
  };
  Place place(int64_t tile) const {
    return {tile / (tall * wide), tile / wide % tall * side, tile % wide * side};
  }
};

// Reads N x N pixels from (y, x) on, zeros outside of the map: one vector of channels each.
template <int N>
inline void Read(const float* image, int64_t h, int64_t w, int64_t channels, int64_t y, int64_t x,
                 int64_t count, Vec* out) {
  if (y >= 0 && x >= 0 && y + N <= h && x + N <= w && count >= kLanes) {
#pragma GCC unroll 36
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 36
      for (int j = 0; j < N; ++j) out[i * N + j] = Load(image + ((y + i) * w + x + j) * channels);
    return;
  }
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) {
      const bool inside = y + i >= 0 && y + i < h && x + j >= 0 && x + j < w;
      out[i * N + j] =
          inside ? Load(image + ((y + i) * w + x + j) * channels, count) : Vec{};
    }
}

// Transforms `count` channels of N x N pixels from (y, x) on to kPlaces rows, `step` apart.
template <int N, typename T>
inline void Transform(const float* image, int64_t h, int64_t w, int64_t pitch, int64_t y, int64_t x,
                      int64_t count, float* to, int64_t step) {
  for (int64_t c = 0; c < count; c += kLanes) {
    Vec pixels[N * N], places[kPlaces];
    Read<N>(image + c, h, w, pitch, y, x, count - c, pixels);
    Both<T>(pixels, places);
#pragma GCC unroll 36
    for (int p = 0; p < kPlaces; ++p) Store(to + p * step + c, places[p]);
  }
}

// At least so many floats, an odd number of vectors: data that far apart does not compete for the
// same lines of a cache.
constexpr int64_t Spaced(int64_t floats) { return (Parts(floats, kLanes) | 1) * kLanes; }

// The values of a kernel, (groups, kPlaces, panels, in, V vectors); columns beyond `out` are zeros.
// If `turned`, it is the kernel of the gradient: rotated by half a turn, in and out exchanged.
template <int K, int V>
void KernelValues(ffi::ThreadPool& pool, const float* kernel, const Tiling& t, bool turned,
                  float* values) {
  constexpr int64_t kRowsOfPart = 16, kWidth = V * kLanes;
  const int64_t panels = Parts(t.out, kWidth), blocks = Parts(t.in, kRowsOfPart);
  const int64_t pitch = t.groups * (turned ? t.in : t.out);  // of the kernel's own rows
  Parallel(pool, t.groups * blocks, [&](int64_t part) {
    const int64_t group = part / blocks, first = part % blocks * kRowsOfPart;
    for (int64_t column = 0; column < panels * kWidth; column += kLanes)
      for (int64_t row = first; row < std::min(first + kRowsOfPart, t.in); ++row) {
        const int64_t count = std::clamp<int64_t>(t.out - column, 0, kLanes);
        Vec taps[K * K]{}, at[kPlaces];
        for (int k = 0; count && k < K * K; ++k) {
          if (!turned) {
            taps[k] = Load(kernel + (k * t.in + row) * pitch + group * t.out + column, count);
            continue;
          }
          const int64_t tap = K * K - 1 - k;
          const float* from = kernel + (tap * t.out + column) * pitch + group * t.in + row;
          for (int64_t lane = 0; lane < count; ++lane) taps[k][lane] = from[lane * pitch];
        }
        Both<Evaluate<K>>(taps, at);
        float* to = values + group * kPlaces * panels * t.in * kWidth +
                    (column / kWidth * t.in + row) * kWidth + column % kWidth;
        for (int p = 0; p < kPlaces; ++p)
          Store(to + p * panels * t.in * kWidth, at[p] * (kScale[p / kSide] * kScale[p % kSide]));
      }
  });
}

template <int K, int V>
void TiledOutputs(ffi::ThreadPool& pool, const float* x, const float* kernel, float* y,
              const Tiling& t, bool turned) {
  constexpr int M = kSide + 1 - K;
  constexpr int64_t kTiles = 3 * kRows<V>, kWidth = V * kLanes;  // of a block, of a panel
  const int64_t panels = Parts(t.out, kWidth), pitch = Spaced(t.in);
  const int64_t x_place = Spaced(kTiles * pitch), y_place = Spaced(kTiles * kWidth);
  const int64_t blocks = Parts(t.tiles(), kTiles);
  const Memory values(t.groups * kPlaces * panels * t.in * kWidth);
  KernelValues<K, V>(pool, kernel, t, turned, values);
  Parallel(pool, t.groups * blocks, [&](int64_t part) {
    const int64_t group = part / blocks, first = part % blocks * kTiles;
    const int64_t tiles = std::min(kTiles, t.tiles() - first);
    const Memory pixels(kPlaces * x_place), products(kPlaces * y_place);  // (kTiles, channels) each
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const auto at = t.place(first + tile);
      const float* image = x + at.image * t.h * t.w * t.groups * t.in + group * t.in;
      Transform<kSide, Pixels>(image, t.h, t.w, t.groups * t.in, at.y - t.top, at.x - t.left, t.in,
                               pixels + tile * pitch, x_place);
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t p = 0; p < kPlaces; ++p) {
        const int64_t matrix = (group * kPlaces + p) * panels + panel;
        Rows<V>(tiles, {pixels + p * x_place, pitch, 1, 0},
                {values + matrix * t.in * kWidth, kWidth}, 1, t.in,
                products + p * y_place, kWidth, false);
      }
      const int64_t channels = std::min(kWidth, t.out - panel * kWidth);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const auto at = t.place(first + tile);
        for (int64_t c = 0; c < channels; c += kLanes) {
          Vec places[kPlaces], found[M * M];
#pragma GCC unroll 36
          for (int p = 0; p < kPlaces; ++p)
            places[p] = Load(products + p * y_place + tile * kWidth + c);
          Both<Collect<M>>(places, found);
          float* to = y + group * t.out + panel * kWidth + c;
          for (int i = 0; i < std::min<int64_t>(M, t.oh - at.y); ++i)
            for (int j = 0; j < std::min<int64_t>(M, t.ow - at.x); ++j)
              Store(to + ((at.image * t.oh + at.y + i) * t.ow + at.x + j) * t.groups * t.out,
                    found[i * M + j], channels - c);
        }
      }
    }
  });
}

// The kernel's gradient: products of pixels and gradients, summed over tiles. A part covers some of
// the input and output channels, so few that a core's cache holds sums and factors.
template <int K, int V>
void TiledWeights(ffi::ThreadPool& pool, const float* x, const float* dy, float* dkernel,
                  const Tiling& t) {
  constexpr int M = kSide + 1 - K;
  constexpr int64_t kTiles = 48, kIn = 64, kWidth = V * kLanes, kOut = 64 / kWidth * kWidth;
  const int64_t ins = Parts(t.in, kIn), outs = Parts(t.out, kOut);
  constexpr int64_t x_pitch = Spaced(kIn), x_place = Spaced(kTiles * x_pitch);
  constexpr int64_t dy_pitch = Spaced(kOut), dy_place = Spaced(kTiles * dy_pitch);
  constexpr int64_t sum_place = Spaced(kIn * kOut);
  Parallel(pool, t.groups * ins * outs, [&](int64_t part) {
    const int64_t group = part / (ins * outs), first_in = part / outs % ins * kIn;
    const int64_t first_out = part % outs * kOut;
    const int64_t in = std::min(kIn, t.in - first_in), out = std::min(kOut, t.out - first_out);
    const Memory pixels(kPlaces * x_place), gradients(kPlaces * dy_place);  // (kTiles, channels)
    const Memory sums(kPlaces * sum_place);                                 // (kIn, kOut) each
    for (int64_t first = 0; first == 0 || first < t.tiles(); first += kTiles) {  // if empty, zeros
      const int64_t tiles = std::min(kTiles, t.tiles() - first);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const auto at = t.place(first + tile);
        const float* image = x + at.image * t.h * t.w * t.groups * t.in + group * t.in + first_in;
        Transform<kSide, Pixels>(image, t.h, t.w, t.groups * t.in, at.y - t.top, at.x - t.left, in,
                                 pixels + tile * x_pitch, x_place);
        image = dy + at.image * t.oh * t.ow * t.groups * t.out + group * t.out + first_out;
        Transform<M, Evaluate<M>>(image, t.oh, t.ow, t.groups * t.out, at.y, at.x, out,
                                  gradients + tile * dy_pitch, dy_place);
      }
      for (int64_t p = 0; p < kPlaces; ++p)
        for (int64_t column = 0; column < out; column += kWidth)
          Rows<V>(in, {pixels + p * x_place, 1, x_pitch, 0},
                  {gradients + p * dy_place + column, dy_pitch}, 1, tiles,
                  sums + p * sum_place + column, kOut, first > 0);
    }
    for (int64_t i = 0; i < in; ++i)
      for (int64_t o = 0; o < out; o += kLanes) {
        Vec at[kPlaces], taps[K * K];
        for (int p = 0; p < kPlaces; ++p)
          at[p] = Load(sums + p * sum_place + i * kOut + o) *
                  (kScale[p / kSide] * kScale[p % kSide]);
        Both<Collect<K>>(at, taps);
        for (int k = 0; k < K * K; ++k)
          Store(dkernel + ((k * t.in + first_in + i) * t.groups + group) * t.out + first_out + o,
                taps[k], out - o);
      }
  });
}

// Calls `call` with the size of the kernel and the panels that suit the columns.
template <typename F>
ffi::Error WithKernel(int64_t side, int64_t columns, const F& call) {
  if (side != 3 && side != 5) return ffi::Error::InvalidArgument("the kernel is not 3x3 or 5x5");
  WithPanels(columns, [&](auto v) {
    if (side == 3)
      call(std::integral_constant<int, 3>(), v);
    else
      call(std::integral_constant<int, 5>(), v);
  });
  return ffi::Error::Success();
}

// `top` and `left` are the padding before the input; the output's size implies that after it.
ffi::Error Winograd(ffi::ThreadPool pool, Input x, Input kernel, Output y, int64_t groups,
                    int64_t top, int64_t left, bool turned) {
  const int64_t side = kernel.dimensions()[0];
  const Tiling t(x.dimensions(), y->dimensions(), groups, top, left, kSide + 1 - side);
  return WithKernel(side, t.out, [&](auto k, auto v) {
    TiledOutputs<k(), v()>(pool, x.typed_data(), kernel.typed_data(), Fresh(y), t, turned);
  });
}

ffi::Error WinogradWeights(ffi::ThreadPool pool, Input x, Input dy, Output dkernel, int64_t groups,
                           int64_t top, int64_t left) {
  const int64_t side = dkernel->dimensions()[0];
  const Tiling t(x.dimensions(), dy.dimensions(), groups, top, left, kSide + 1 - side);
  return WithKernel(side, t.out, [&](auto k, auto v) {
    TiledWeights<k(), v()>(pool, x.typed_data(), dy.typed_data(), Fresh(dkernel), t);
  });
}

}  // namespace
