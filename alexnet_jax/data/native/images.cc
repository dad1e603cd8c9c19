// Copies, mirrors, shrinks, enlarges and sums up windows of RGB images. No fused multiply-adds (the compiler
// is told -ffp-contract=off), so that the results are those of numpy, bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kChannels = 3;
constexpr int64_t kBehind = 32;  // numbers after a line and its pixels that may be read or written

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef float Pixel __attribute__((vector_size(16)));  // and an unused lane

#if defined(__clang__)
#define SHUFFLED(bytes, ...) __builtin_shufflevector(bytes, bytes, __VA_ARGS__)
#else
#define SHUFFLED(bytes, ...) __builtin_shuffle(bytes, Bytes{__VA_ARGS__})
#endif

// Copies a row of pixels, the last one first.
void Mirror(const uint8_t* from, uint8_t* to, int64_t count) {
  int64_t done = 0;
  // Five pixels at once; the sixteenth byte is of the next pixel, which overwrites it.
  for (const uint8_t* end = from + kChannels * count; done + 6 <= count; done += 5) {
    Bytes five;
    std::memcpy(&five, end - kChannels * done - 16, 16);
    five = SHUFFLED(five, 13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0);
    std::memcpy(to + kChannels * done, &five, 16);
  }
  for (; done < count; ++done) {
    std::memcpy(to + kChannels * done, from + kChannels * (count - 1 - done), kChannels);
  }
}

// Writes a row past the caches: it is not read soon, and what they hold is needed.
void Stream(const uint8_t* from, uint8_t* to, int64_t size) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (; size >= 16; size -= 16, from += 16, to += 16) {
      const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), some);
    }
  }
#endif
  std::memcpy(to, from, size);
}

// Makes such rows visible before anything written later. Also clears the upper halves of registers,
// which a compiler may forget: code compiled for SSE, such as decoders, is slower otherwise.
void Finish() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
#if defined(__AVX__)
  _mm256_zeroupper();
#endif
}

// What `count` output pixels from `first` on are made of along one axis of the image: taps[i] input
// pixels from start[i] on, each with its share. Shrinking averages areas, enlarging uses the cubic.
struct Cover {
  std::vector<int64_t> start, taps;
  std::vector<float> shares;  // of pixel i from i * most on
  int64_t most;
  bool cubic;

  Cover(int64_t inputs, int64_t outputs, int64_t first, int64_t count) : start(count), taps(count) {
    const double scale = double(inputs) / double(outputs);
    cubic = outputs > inputs;
    most = cubic ? 5 : int64_t(scale) + 2;
    shares.resize(count * most);
    for (int64_t i = 0; i < count; ++i) {
      float* share = shares.data() + i * most;
      if (!cubic) {
        const double begin = double(first + i) * scale;
        const double end = std::min(double(first + i + 1) * scale, double(inputs));
        start[i] = int64_t(begin);
        taps[i] = std::min(most, inputs - start[i]);
        for (int64_t j = 0; j < taps[i]; ++j) {
          const double pixel = double(start[i] + j);
          const double covered = std::min(end, pixel + 1) - std::max(begin, pixel);
          share[j] = float(std::max(covered, 0.0) / scale);
        }
        while (share[taps[i] - 1] == 0.0f && taps[i] > 1) --taps[i];
      } else {
        const double centre = (double(first + i) + 0.5) * scale;
        start[i] = int64_t(std::max(centre - 1.5, 0.0));
        taps[i] = std::min(most, inputs - start[i]);
        double weights[5], total = 0;
        for (int64_t j = 0; j < taps[i]; ++j) {
          weights[j] = Cubic(std::abs(double(start[i] + j) + 0.5 - centre));
          total += weights[j];
        }
        for (int64_t j = 0; j < taps[i]; ++j) share[j] = float(weights[j] / total);
      }
    }
  }
  int64_t low() const { return start.front(); }
  int64_t high() const { return start.back() + taps.back(); }

  // Keys's cubic, a = -1/2.
  static double Cubic(double far) {
    if (far < 1) return (1.5 * far - 2.5) * far * far + 1;
    if (far < 2) return (((far - 5) * far + 8) * far - 4) * -0.5;
    return 0;
  }
};

// Added to a number, this rounds it, half to even, and leaves the pixel in its lowest byte.
constexpr float kRound = 8388608.0f;

#if defined(__AVX512F__)

constexpr int64_t kLanes = 16;

// `Down` in vectors of lanes; the last vector ends where the row does.
template <int64_t kTaps>
void DownInLanes(const uint8_t* from, int64_t pitch, const float* shares, float* sums,
                 int64_t count) {
  for (int64_t next = 0; next < count; next += kLanes) {
    const int64_t i = std::min(next, count - kLanes);
    const auto part = [=](int64_t tap) {
      __m128i bytes;
      std::memcpy(&bytes, from + tap * pitch + i, sizeof(bytes));
      return shares[tap] * _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    };
    __m512 sum = part(0);
    for (int64_t tap = 1; tap < kTaps; ++tap) sum += part(tap);
    _mm512_storeu_ps(sums + i, sum);
  }
}

// `Across` in lanes, for shrinking to more than half: several pixels at once, which are made of 32
// numbers of the line.
class AcrossInLanes {
 public:
  static bool Can(const Cover& across) { return across.most == kTaps && !across.cubic; }

  AcrossInLanes(const Cover& across, int64_t inputs, int64_t outputs, int64_t side)
      : pixels_(4 * inputs <= 7 * outputs ? 5 : 4), groups_((side + pixels_ - 1) / pixels_) {
    for (int64_t column = 0; column < side; ++column) {
      Group& group = groups_[column / pixels_];
      const int64_t start = kChannels * (across.start[column] - across.low());
      int64_t lane = kChannels * (column % pixels_);
      if (lane == 0) group.start = start;
      for (int64_t channel = 0; channel < kChannels; ++channel, ++lane) {
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          group.picks[tap][lane] = int32_t(start - group.start + kChannels * tap + channel);
          group.shares[tap][lane] = across.shares[column * kTaps + tap];
        }
      }
    }
  }

  void operator()(const float* line, uint8_t* to) const {
    for (const Group& group : groups_) {
      const __m512 low = _mm512_loadu_ps(line + group.start);
      const __m512 high = _mm512_loadu_ps(line + group.start + kLanes);
      const auto part = [&](int64_t tap) {
        const __m512i picks = _mm512_load_si512(group.picks[tap]);
        return _mm512_load_ps(group.shares[tap]) * _mm512_permutex2var_ps(low, picks, high);
      };
      const __m512 sum = part(0) + part(1) + part(2);
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(sum + kRound));
      std::memcpy(to, &bytes, sizeof(bytes));
      to += kChannels * pixels_;
    }
  }

 private:
  static constexpr int64_t kTaps = 3;
  struct alignas(64) Group {
    int32_t picks[kTaps][kLanes];
    float shares[kTaps][kLanes];
    int64_t start;
  };
  const int64_t pixels_;
  std::vector<Group> groups_;
};
#endif

// Prefetches rows of `count` bytes, which may have left the caches since they were decoded.
void Fetch(const uint8_t* from, int64_t pitch, int64_t rows, int64_t count) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(from + row * pitch + i);
  }
}

// Weighted sums of `taps` rows of `count` bytes.
void Down(const uint8_t* from, int64_t pitch, const float* shares, int64_t taps, float* sums,
          int64_t count) {
#if defined(__AVX512F__)
  if (count >= kLanes) {
    switch (taps) {
      case 1: return DownInLanes<1>(from, pitch, shares, sums, count);
      case 2: return DownInLanes<2>(from, pitch, shares, sums, count);
      case 3: return DownInLanes<3>(from, pitch, shares, sums, count);
      case 4: return DownInLanes<4>(from, pitch, shares, sums, count);
    }
  }
#endif
  const uint8_t* second = from + pitch;
  if (taps == 1) {
    for (int64_t i = 0; i < count; ++i) sums[i] = shares[0] * float(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      sums[i] = shares[0] * float(from[i]) + shares[1] * float(second[i]);
    }
  }
  for (int64_t tap = 2; tap < taps; ++tap) {
    const uint8_t* input = from + tap * pitch;
    for (int64_t i = 0; i < count; ++i) sums[i] += shares[tap] * float(input[i]);
  }
}

// Makes pixels from a line of sums.
template <int64_t kMost>
void Across(const Cover& across, const float* line, int64_t side, uint8_t* to) {
  const int64_t most = kMost ? kMost : across.most, low = across.low();
  const float* shares = across.shares.data();
  for (int64_t column = 0; column < side; ++column, shares += most, to += kChannels) {
    const float* input = line + kChannels * (across.start[column] - low);
    Pixel sum{};
    for (int64_t tap = 0; tap < most; ++tap, input += kChannels) {
      Pixel pixel;
      std::memcpy(&pixel, input, sizeof(pixel));
      sum += shares[tap] * pixel;
    }
    if (across.cubic) sum = sum < 0.0f ? Pixel{} : sum > 255.0f ? Pixel{} + 255.0f : sum;
    const Bytes bits = reinterpret_cast<Bytes>(sum + kRound);
    const Bytes first = SHUFFLED(bits, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    std::memcpy(to, &first, 4);
  }
}

}  // namespace

extern "C" {

// Copies a window of `rows` x `columns` pixels; pitches are the bytes from row to row.
int64_t copy(const uint8_t* from, int64_t pitch, uint8_t* to, int64_t to_pitch, int64_t rows,
             int64_t columns, int64_t mirror) {
  std::vector<uint8_t> turned(mirror ? kChannels * columns : 0);
  for (int64_t row = 0; row < rows; ++row, from += pitch, to += to_pitch) {
    if (mirror) Mirror(from, turned.data(), columns);
    Stream(mirror ? turned.data() : from, to, kChannels * columns);
  }
  Finish();
  return 0;
}

// Writes the window of `side` x `side` pixels at (top, left) of the image of (height, width)
// resized to (tall, wide).
int64_t resize(const uint8_t* from, int64_t pitch, int64_t height, int64_t width, int64_t tall,
               int64_t wide, int64_t top, int64_t left, int64_t side, int64_t mirror, uint8_t* to,
               int64_t to_pitch) {
  if (side <= 0) return 0;
  const Cover down(height, tall, top, side), across(width, wide, left, side);
  const int64_t low = across.low(), count = kChannels * (across.high() - low);
  std::vector<float> line(count + kChannels * across.most + kBehind);
  std::vector<uint8_t> pixels(kChannels * side + kBehind), turned(kChannels * side);
  const auto input = [&](int64_t row) { return from + down.start[row] * pitch + kChannels * low; };
  const auto rows = [&](const auto& pixels_of) {
    for (int64_t row = 0; row < side; ++row, to += to_pitch) {
      if (row + 1 < side) Fetch(input(row + 1), pitch, down.taps[row + 1], count);
      const float* shares = down.shares.data() + row * down.most;
      Down(input(row), pitch, shares, down.taps[row], line.data(), count);
      pixels_of(line.data(), pixels.data());
      if (mirror) Mirror(pixels.data(), turned.data(), side);
      Stream(mirror ? turned.data() : pixels.data(), to, kChannels * side);
    }
  };
#if defined(__AVX512F__)
  if (AcrossInLanes::Can(across)) {
    rows(AcrossInLanes(across, width, wide, side));
    Finish();
    return 0;
  }
#endif
  rows([&](const float* line, uint8_t* to) {
    switch (across.most) {
      case 3: return Across<3>(across, line, side, to);
      case 4: return Across<4>(across, line, side, to);
      case 5: return Across<5>(across, line, side, to);
      default: return Across<0>(across, line, side, to);
    }
  });
  Finish();
  return 0;
}

// Adds an image of `count` pixels to the sums of every pixel, and the products of its channels,
// 3 x 3, to theirs.
int64_t add(const uint8_t* image, int64_t count, int64_t* pixels, int64_t* products) {
  constexpr int64_t kSome = 1 << 16;  // as many squares of bytes fit into 32 bits
  for (int64_t i = 0; i < kChannels * count; ++i) pixels[i] += image[i];
  for (const uint8_t* end = image + kChannels * count; image < end;) {
    const uint8_t* until = std::min(end, image + kChannels * kSome);
    uint32_t rr = 0, rg = 0, rb = 0, gg = 0, gb = 0, bb = 0;
    for (; image < until; image += kChannels) {
      const uint32_t r = image[0], g = image[1], b = image[2];
      rr += r * r, rg += r * g, rb += r * b, gg += g * g, gb += g * b, bb += b * b;
    }
    const uint32_t found[] = {rr, rg, rb, rg, gg, gb, rb, gb, bb};
    for (int64_t i = 0; i < kChannels * kChannels; ++i) products[i] += found[i];
  }
  Finish();
  return 0;
}

}  // extern "C"
