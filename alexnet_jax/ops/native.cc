// What a training step computes on a CPU, called by XLA.
//
// Arrays are float32 in row-major order: images (b, h, w, channels), kernels (kh, kw, i, o). Work
// is cut into parts by the shapes alone, so that results do not depend on how many threads there
// are, or which does what.
//
// Kernels of 3x3 and 5x5 in steps of 1 go by Winograd's algorithm in two dimensions (Lavin and
// Gray, 2015, arXiv:1509.09308). A line of 6 pixels and a kernel line of r give m = 7 - r outputs
// with 6 products: seen as polynomials, the kernel and the gradient of the outputs are evaluated at
// six points. So F(4, 3) and F(2, 5) share everything but r. The points are 0, +-sqrt(1/2),
// +-sqrt(2) and infinity, which round a third as much as 0, +-1, +-2.

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include <sys/mman.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Input = ffi::Buffer<ffi::F32>;
using Output = ffi::Result<ffi::Buffer<ffi::F32>>;

// ------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec Load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void Store(float* to, Vec value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Vec Splat(float value) { return value - Vec{}; }

// The first `count` lanes, which may be all of them; the others are zeros.
inline Vec Load(const float* from, int64_t count) {
  if (count >= kLanes) return Load(from);
  Vec value{};
  std::memcpy(&value, from, 4 * count);
  return value;
}
inline void Store(float* to, Vec value, int64_t count) {
  if (count >= kLanes) return Store(to, value);
  std::memcpy(to, &value, 4 * count);
}

constexpr int64_t Parts(int64_t total, int64_t size) { return (total + size - 1) / size; }
constexpr int64_t Padded(int64_t total, int64_t size) { return Parts(total, size) * size; }

// -------------------------------------------------------------------------------- memory, threads

// Memory that is used again by the next call: fresh memory costs a page fault every 4 KiB.
class Memory {
 public:
  explicit Memory(int64_t floats) : size_(Padded(4 * floats + 64, 1 << 21)) {
    Spare& spare = Spares();
    std::lock_guard<std::mutex> lock(spare.mutex);
    auto best = spare.free.end();
    for (auto it = spare.free.begin(); it != spare.free.end(); ++it)
      if (it->first >= size_ && (best == spare.free.end() || it->first < best->first)) best = it;
    if (best != spare.free.end()) {
      std::tie(size_, data_) = *best;
      spare.free.erase(best);
    } else {
      spare.free.reserve(++spare.count);  // giving it back cannot fail
      data_ = static_cast<float*>(::operator new(size_, std::align_val_t(1 << 21)));
#if defined(MADV_HUGEPAGE)
      madvise(data_, size_, MADV_HUGEPAGE);
#endif
    }
  }
  ~Memory() {
    std::lock_guard<std::mutex> lock(Spares().mutex);
    Spares().free.emplace_back(size_, data_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  operator float*() const { return data_; }

 private:
  struct Spare {
    std::mutex mutex;
    std::vector<std::pair<int64_t, float*>> free;
    size_t count = 0;  // of all that were ever taken
  };
  static Spare& Spares() {
    static Spare* spare = new Spare;  // never destroyed: a step may run while the process ends
    return *spare;
  }
  int64_t size_;
  float* data_;
};

// XLA takes fresh memory for every step. In pages of 2 MiB the first touch of it is cheaper, and so
// is every later look.
float* Fresh(Output& output) {
  float* data = output->typed_data();
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + output->size_bytes()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return data;
}

// Calls work(0) to work(count - 1) on XLA's threads and this one, and returns when all is done, or
// throws what the first part that failed has thrown. A thread of the pool that comes late finds
// nothing left; nobody waits for it.
void Parallel(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& work) {
  struct Shared {
    std::function<void(int64_t)> work;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::exception_ptr failure;
    void Run() {
      for (int64_t part; (part = next.fetch_add(1)) < count;) {
        try {
          work(part);
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex);
          if (!failure) failure = std::current_exception();
        }
        if (done.fetch_add(1) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          all_done.notify_all();
        }
      }
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->work = work;
  shared->count = count;
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Run(); });
  } catch (const std::bad_alloc&) {  // fewer helpers
  }
  shared->Run();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done.load() == count; });
  if (shared->failure) std::rethrow_exception(shared->failure);
}

// ------------------------------------------------------------------------------ matrix products

// Rows and vectors of a product that registers hold, beside what they are made from.
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

// c (R rows of V vectors) = left * right, summed over `runs` runs of `count` each, or added to c:
// as a sum of its own, since sums of sums round less than one long sum.
template <int R, int V>
void Product(Left left, Right right, int64_t runs, int64_t count, float* c, int64_t c_row,
             bool add) {
  Vec sum[R][V]{};
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
  for (int r = 0; r < R; ++r)
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

// Columns are padded to whole panels of V vectors: calls it with the V of the least padding.
template <typename F>
void WithPanels(int64_t columns, const F& call) {
  if (Padded(columns, 3 * kLanes) < Padded(columns, 2 * kLanes))
    call(std::integral_constant<int, 3>());
  else
    call(std::integral_constant<int, 2>());
}

// ------------------------------------------------------------------------------------ Winograd

constexpr int kSide = 6;  // of a tile of pixels
constexpr int kPlaces = kSide * kSide;

// The points p and -p that are not 0 or infinity, and their squares.
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

// Of six pixels, what meets a kernel's values at the six points.
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

// One of them along both sides: (kIn, kIn) -> (kOut, kOut).
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

// What the values of a kernel are divided by to make the product that of the polynomials.
constexpr float kScale[kSide] = {1, -2.f / 3, -2.f / 3, 1.f / 6, 1.f / 6, 1};

// A convolution in steps of 1, seen as tiles; a group's channels lie side by side.
struct Tiling {
  int64_t b, h, w, in;   // of what is read, channels of one group
  int64_t oh, ow, out;   // of what is written
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

// At least so many floats, an odd number of vectors: what lies so far apart does not compete for
// the same lines of a cache.
constexpr int64_t Spaced(int64_t floats) { return (Parts(floats, kLanes) | 1) * kLanes; }

// The values of a kernel, (groups, kPlaces, panels, in, V vectors); columns beyond `out` are zeros.
// Where `turned`, it is the kernel of the gradient: turned round, its in and out exchanged.
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

// The kernel's gradient: products of pixels and gradients, summed over tiles. A part is some of the
// channels read and some of those written, so few that a core's cache holds sums and factors.
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
    for (int64_t first = 0; first == 0 || first < t.tiles(); first += kTiles) {  // none: zeros
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

// The two kernels there are, and the panels that suit the columns.
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

// `top` and `left` are zeros before what is read; how many follow, the output's size tells.
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

// ---------------------------------------------------------------------------------- large steps

// A convolution of one group in any steps, for few channels: a row of the kernel meets a run of
// pixels that lie side by side, so that windows need not be copied.
struct Windows {
  int64_t h, w, in, oh, ow, out, kh, run, stride, top, left;
  int64_t tall, pitch;  // of an image with its zeros: rows, floats of a row

  Windows(ffi::Span<const int64_t> x, ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> y,
          int64_t stride, int64_t top, int64_t left)
      : h(x[1]), w(x[2]), in(x[3]), oh(y[1]), ow(y[2]), out(y[3]), kh(kernel[0]),
        run(kernel[1] * in), stride(stride), top(top), left(left),
        tall((oh - 1) * stride + kh), pitch((ow - 1) * stride * in + run) {}

  // Of an image all that windows reach, zeros where they overhang: (tall, pitch).
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
void StridedOutputs(ffi::ThreadPool& pool, const float* x, const float* kernel, float* y, int64_t b,
             const Windows& s) {
  constexpr int64_t kWidth = V * kLanes;
  const int64_t panels = Parts(s.out, kWidth), depth = s.kh * s.run;
  const Memory packed(panels * depth * kWidth);
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t v = 0; v < kWidth; v += kLanes) {
        const int64_t column = panel * kWidth + v, count = std::max<int64_t>(0, s.out - column);
        Store(packed + (panel * depth + k) * kWidth + v,
              count ? Load(kernel + k * s.out + column, count) : Vec{});
      }
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
  const int64_t parts = std::min<int64_t>(b, 16);
  const Memory sums(parts * depth * columns);
  Parallel(pool, parts, [&](int64_t part) {
    const Memory pixels(s.tall * s.pitch), gradients(s.oh * s.ow * columns);
    float* sum = sums + part * depth * columns;
    std::memset(sum, 0, 4 * depth * columns);
    for (int64_t image = b * part / parts; image < b * (part + 1) / parts; ++image) {
      s.Surround(x + image * s.h * s.w * s.in, pixels);
      const float* own = dy + image * s.oh * s.ow * s.out;
      if (columns > s.out) {  // whole panels of them
        for (int64_t p = 0; p < s.oh * s.ow; ++p) {
          std::memcpy(gradients + p * columns, own + p * s.out, 4 * s.out);
          std::memset(gradients + p * columns + s.out, 0, 4 * (columns - s.out));
        }
        own = gradients;
      }
      for (int64_t column = 0; column < columns; column += kWidth)
        for (int64_t i = 0; i < s.kh; ++i)
          Rows<V>(s.run, {pixels + i * s.pitch, 1, s.stride * s.in, s.stride * s.pitch},
                  {own + column, columns}, s.oh, s.ow, sum + i * s.run * columns + column, columns,
                  true);
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

// ------------------------------------------------------------------------------ fully connected

// `rows` of `count` floats in panels of `width`, row after row, zeros beyond `count`.
void Pack(const float* from, int64_t pitch, int64_t rows, int64_t count, int64_t width, float* to) {
  for (int64_t column = 0; column < count; column += width)
    for (int64_t row = 0; row < rows; ++row, to += width)
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t left = std::max<int64_t>(0, count - column - c);
        Store(to + c, left ? Load(from + row * pitch + column + c, left) : Vec{});
      }
}

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

// y (b, out) = x (b, in) * weights (in, out). Weights are read once, and packed for a few products.
ffi::Error Dense(ffi::ThreadPool pool, Input x, Input weights, Output y) {
  constexpr int64_t kColumns = 8 * kPanelWidth, kDeep = 64;
  const int64_t b = x.dimensions()[0], in = x.dimensions()[1], out = weights.dimensions()[1];
  const float *from = x.typed_data(), *w = weights.typed_data();
  Parallel(pool, Parts(out, kColumns), [&](int64_t part) {
    const int64_t first = part * kColumns, columns = std::min(kColumns, out - first);
    const Memory packed(kDeep * kColumns), sums(b * kColumns);
    for (int64_t k = 0; k == 0 || k < in; k += kDeep) {  // none: zeros
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

// dx (b, in) = dy (b, out) * weights (in, out) transposed; made as its own transpose.
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
    for (int64_t k = 0; k == 0 || k < out; k += kDeep) {  // none: zeros
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

// -------------------------------------------------------------------------------------- update

// The paper's update, in place, unless `good` is false:
//   velocity = momentum * velocity - rate * (gradient + decay * weight),  weight += velocity
// squares: of the update and of the weights before, summed; zeros where nothing is updated.
ffi::Error Update(ffi::ThreadPool pool, Input weights, Input velocity, Input gradient, Input rate,
                  ffi::Buffer<ffi::PRED> good, Output new_weights, Output new_velocity,
                  Output squares, float momentum, float decay) {
  constexpr int64_t kPart = 1 << 15;
  const int64_t count = weights.element_count(), parts = Parts(count, kPart);
  float* sums = squares->typed_data();
  sums[0] = sums[1] = 0;
  float *w = new_weights->typed_data(), *v = new_velocity->typed_data();
  // XLA may have found it better to copy them.
  if (w != weights.typed_data()) std::memcpy(w, weights.typed_data(), 4 * count);
  if (v != velocity.typed_data()) std::memcpy(v, velocity.typed_data(), 4 * count);
  if (!good.typed_data()[0]) return ffi::Error::Success();
  const float* g = gradient.typed_data();
  const float step = rate.typed_data()[0];
  const Memory partial(2 * parts);
  Parallel(pool, parts, [&](int64_t part) {
    Vec of_update{}, of_weight{};
    const int64_t last = std::min((part + 1) * kPart, count);
    for (int64_t i = part * kPart; i < last; i += kLanes) {
      const Vec old = Load(w + i, last - i);
      const Vec update = momentum * Load(v + i, last - i) -
                         step * (Load(g + i, last - i) + decay * old);
      Store(v + i, update, last - i);
      Store(w + i, old + update, last - i);
      of_update += update * update;
      of_weight += old * old;
    }
    float* own = partial + 2 * part;
    own[0] = own[1] = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      own[0] += of_update[lane];
      own[1] += of_weight[lane];
    }
  });
  for (int64_t part = 0; part < parts; ++part)
    for (int i = 0; i < 2; ++i) sums[i] += partial[2 * part + i];
  return ffi::Error::Success();
}

// -------------------------------------------------------------------------------- normalisation

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

// Response normalisation with power 3/4, pixels of `channels` maps in `groups`.
struct Normalisation {
  int64_t pixels, channels, groups, size;
  float k, alpha;

  static constexpr int64_t kPixels = 64;  // of a part

  // Lines of a group's maps, zeros on both sides, for sums over neighbours.
  int64_t width() const { return channels / groups; }
  int64_t reach() const { return size / 2; }
  int64_t line() const { return Padded(width() + 2 * reach(), kLanes) + kLanes; }

  Vec Neighbours(const float* line, int64_t c) const {
    Vec sum = Load(line + c);
    for (int64_t i = 1; i <= 2 * reach(); ++i) sum += Load(line + c + i);
    return sum;
  }

  // Calls work(first float, a line of zeros, another) for every pixel and group.
  template <typename F>
  void ForEach(ffi::ThreadPool& pool, const F& work) const {
    Parallel(pool, Parts(pixels, kPixels), [&](int64_t part) {
      const Memory lines(2 * line());
      std::memset(lines, 0, 8 * line());
      for (int64_t p = part * kPixels; p < std::min((part + 1) * kPixels, pixels); ++p)
        for (int64_t group = 0; group < groups; ++group)
          work(p * channels + group * width(), static_cast<float*>(lines), lines + line());
    });
  }
};

ffi::Error Normalise(ffi::ThreadPool pool, Input x, Output y, int64_t groups, int64_t size, float k,
                     float alpha) {
  const int64_t channels = x.dimensions().back();
  const Normalisation n{static_cast<int64_t>(x.element_count()) / channels, channels, groups, size,
                        k, alpha};
  float* result = Fresh(y);
  n.ForEach(pool, [&](int64_t first, float* squares, float*) {
    const float* from = x.typed_data() + first;
    for (int64_t c = 0; c < n.width(); c += kLanes) {
      const Vec value = Load(from + c, n.width() - c);
      Store(squares + n.reach() + c, value * value, n.width() - c);
    }
    for (int64_t c = 0; c < n.width(); c += kLanes) {
      const Vec root = InverseRoot(k + alpha * n.Neighbours(squares, c));
      const Vec power = root * root * InverseRoot(root);
      Store(result + first + c, Load(from + c, n.width() - c) * power, n.width() - c);
    }
  });
  return ffi::Error::Success();
}

// dx[i] = dy[i] s[i] ** -3/4 - 3/2 alpha x[i] * sum over neighbours j of dy[j] x[j] s[j] ** -7/4
ffi::Error NormaliseGradient(ffi::ThreadPool pool, Input x, Input dy, Output dx, int64_t groups,
                             int64_t size, float k, float alpha) {
  const int64_t channels = x.dimensions().back();
  const Normalisation n{static_cast<int64_t>(x.element_count()) / channels, channels, groups, size,
                        k, alpha};
  float* result = Fresh(dx);
  n.ForEach(pool, [&](int64_t first, float* squares, float* shares) {
    const float* from = x.typed_data() + first;
    float* to = result + first;
    for (int64_t c = 0; c < n.width(); c += kLanes) {
      const Vec value = Load(from + c, n.width() - c);
      Store(squares + n.reach() + c, value * value, n.width() - c);
    }
    for (int64_t c = 0; c < n.width(); c += kLanes) {
      const Vec root = InverseRoot(k + alpha * n.Neighbours(squares, c));
      const Vec direct = Load(dy.typed_data() + first + c, n.width() - c) * root * root *
                         InverseRoot(root);
      const Vec share = direct * Load(from + c, n.width() - c) * root * root;
      Store(shares + n.reach() + c, share, n.width() - c);
      Store(to + c, direct, n.width() - c);
    }
    for (int64_t c = 0; c < n.width(); c += kLanes) {
      const Vec sum = Load(from + c, n.width() - c) * n.Neighbours(shares, c);
      Store(to + c, Load(to + c, n.width() - c) - 1.5f * alpha * sum, n.width() - c);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define ONE ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
#define TWO ONE.Arg<ffi::Buffer<ffi::F32>>()
#define RESULT Ret<ffi::Buffer<ffi::F32>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(winograd, Winograd,
                              TWO.RESULT.Attr<int64_t>("groups")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left")
                                  .Attr<bool>("turned"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(winograd_weights, WinogradWeights,
                              TWO.RESULT.Attr<int64_t>("groups")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(strided, Strided,
                              TWO.RESULT.Attr<int64_t>("stride")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(strided_weights, StridedWeights,
                              TWO.RESULT.Attr<int64_t>("stride")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(normalise, Normalise,
                              ONE.RESULT.Attr<int64_t>("groups")
                                  .Attr<int64_t>("size")
                                  .Attr<float>("k")
                                  .Attr<float>("alpha"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(normalise_gradient, NormaliseGradient,
                              TWO.RESULT.Attr<int64_t>("groups")
                                  .Attr<int64_t>("size")
                                  .Attr<float>("k")
                                  .Attr<float>("alpha"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(dense, Dense, TWO.RESULT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dense_input, DenseInput, TWO.RESULT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(update, Update,
                              TWO.Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RESULT.RESULT.RESULT.Attr<float>("momentum")
                                  .Attr<float>("decay"));
