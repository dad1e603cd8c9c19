// Bytes of JPEGs looked at; windows of RGB images copied, mirrored, made smaller or larger. No two
// roundings are made one (the compiler is told -ffp-contract=off), so that the results are those of
// numpy, bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kChannels = 3;

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef float Pixel __attribute__((vector_size(16)));  // and a lane that is never looked at

#if defined(__clang__)
#define SHUFFLED(bytes, ...) __builtin_shufflevector(bytes, bytes, __VA_ARGS__)
#else
#define SHUFFLED(bytes, ...) __builtin_shuffle(bytes, Bytes{__VA_ARGS__})
#endif

// A row of pixels, the last one first.
void Mirror(const uint8_t* from, uint8_t* to, int64_t count) {
  int64_t done = 0;
  // Five pixels at once; the sixteenth byte is of the next pixel, which is written over it.
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

// Writes a row past the caches: it is long before anybody reads it, and what they hold is needed.
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

// Every such row is there before whatever is told of it.
void Streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// What `count` output pixels from `first` on are made of along one side of the image: input pixels
// from start[i] on, each with its share. Fewer outputs than inputs are means of areas, more are by
// the cubic.
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

  // Keys's, of -1/2.
  static double Cubic(double far) {
    if (far < 1) return (1.5 * far - 2.5) * far * far + 1;
    if (far < 2) return (((far - 5) * far + 8) * far - 4) * -0.5;
    return 0;
  }
};

// Sums of `taps` rows of `count` bytes.
void Down(const uint8_t* from, int64_t pitch, const float* shares, int64_t taps, float* sums,
          int64_t count) {
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

// Pixels of a line of sums, and a byte behind them.
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
    // The nearest whole number, of two the even one, is in the last bits of the sum.
    const Bytes bits = reinterpret_cast<Bytes>(sum + 8388608.0f);
    const Bytes first = SHUFFLED(bits, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    std::memcpy(to, &first, 4);
  }
}

}  // namespace

extern "C" {

// What a JPEG's segments say, from the last bit on: its width and height, 16 bits each; 1 unless they
// show some pixels of one or three channels and no EXIF; the number of scans.
int64_t look(const uint8_t* data, int64_t length) {
  int64_t scans = 0, size = 0, odd = 1, channels = 0;
  for (const uint8_t *place = data, *last = data + length - 3; place <= last; ++place) {
    place = static_cast<const uint8_t*>(std::memchr(place, 0xFF, last + 1 - place));
    if (place == nullptr) break;
    scans += place[1] == 0xDA && place[2] == 0;
  }
  for (int64_t place = 2; place + 10 <= length;) {
    const uint8_t *segment = data + place, kind = segment[1];
    if (segment[0] != 0xFF || kind < 0xC0 || kind == 0xFF) break;
    if (std::memcmp(segment + 4, "Exif\0", 6) == 0) break;
    if (kind == 0xDA) {
      odd = (channels != 1 && channels != 3) || size >> 16 == 0 || (size & 0xFFFF) == 0;
      break;
    }
    if (kind == 0xC0 || kind == 0xC1 || kind == 0xC2) {  // the frame
      size = int64_t(segment[5]) << 24 | segment[6] << 16 | segment[7] << 8 | segment[8];
      channels = segment[9];
    }
    place += 2 + (segment[2] << 8 | segment[3]);
  }
  return scans << 33 | odd << 32 | size;
}

// A window of `rows` times `columns` pixels; pitches are the bytes from row to row.
int64_t copy(const uint8_t* from, int64_t pitch, uint8_t* to, int64_t to_pitch, int64_t rows,
             int64_t columns, int64_t mirror) {
  std::vector<uint8_t> turned(mirror ? kChannels * columns : 0);
  for (int64_t row = 0; row < rows; ++row, from += pitch, to += to_pitch) {
    if (mirror) Mirror(from, turned.data(), columns);
    Stream(mirror ? turned.data() : from, to, kChannels * columns);
  }
  Streamed();
  return 0;
}

// A window of `side` times `side` pixels at (top, left) of the image of (height, width) made
// (tall, wide).
int64_t resize(const uint8_t* from, int64_t pitch, int64_t height, int64_t width, int64_t tall,
               int64_t wide, int64_t top, int64_t left, int64_t side, int64_t mirror, uint8_t* to,
               int64_t to_pitch) {
  if (side <= 0) return 0;
  const Cover down(height, tall, top, side), across(width, wide, left, side);
  const int64_t low = across.low(), count = kChannels * (across.high() - low);
  std::vector<float> line(count + kChannels * across.most + 1);
  std::vector<uint8_t> pixels(kChannels * side + 1), turned(kChannels * side);
  for (int64_t row = 0; row < side; ++row, to += to_pitch) {
    const uint8_t* input = from + down.start[row] * pitch + kChannels * low;
    Down(input, pitch, down.shares.data() + row * down.most, down.taps[row], line.data(), count);
    switch (across.most) {
      case 3: Across<3>(across, line.data(), side, pixels.data()); break;
      case 4: Across<4>(across, line.data(), side, pixels.data()); break;
      case 5: Across<5>(across, line.data(), side, pixels.data()); break;
      default: Across<0>(across, line.data(), side, pixels.data());
    }
    if (mirror) Mirror(pixels.data(), turned.data(), side);
    Stream(mirror ? turned.data() : pixels.data(), to, kChannels * side);
  }
  Streamed();
  return 0;
}

}  // extern "C"
