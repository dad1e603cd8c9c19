// Bytes of JPEGs looked at; windows of RGB images copied, mirrored, made smaller. No two roundings are made one (the compiler
// is told -ffp-contract=off), so that the results are those of numpy and scipy, bit for bit.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kChannels = 3;

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef float Pixel __attribute__((vector_size(16)));  // and a lane that is never looked at

int64_t Count(const uint8_t* data, int64_t length, const char* pattern, int64_t size) {
  int64_t found = 0;
  const uint8_t *place = data, *last = data + length - size;  // where one may begin
  while (place <= last) {
    place = static_cast<const uint8_t*>(std::memchr(place, uint8_t(pattern[0]), last + 1 - place));
    if (place == nullptr) break;
    const bool here = std::memcmp(place, pattern, size) == 0;
    found += here;
    place += here ? size : 1;
  }
  return found;
}

// A row of pixels, the last one first.
void Mirror(const uint8_t* from, uint8_t* to, int64_t count) {
  int64_t done = 0;
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
  // Five pixels at once; the sixteenth byte is of the next pixel, which is written over it.
  for (const uint8_t* end = from + kChannels * count; done + 6 <= count; done += 5) {
    Bytes five;
    std::memcpy(&five, end - kChannels * done - 16, 16);
    five = __builtin_shufflevector(five, five, 13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0);
    std::memcpy(to + kChannels * done, &five, 16);
  }
#endif
#endif
  for (; done < count; ++done) {
    std::memcpy(to + kChannels * done, from + kChannels * (count - 1 - done), kChannels);
  }
}

// What `count` output pixels from `first` on cover of one side of the image: input pixels from
// start[i] on, each with its share.
struct Cover {
  std::vector<int64_t> start, taps;
  std::vector<float> shares;  // of pixel i from i * most on
  int64_t most;

  Cover(int64_t inputs, int64_t outputs, int64_t first, int64_t count)
      : start(count), taps(count) {
    const double scale = double(inputs) / double(outputs);
    most = int64_t(scale) + 2;
    shares.resize(count * most);
    for (int64_t i = 0; i < count; ++i) {
      const double begin = double(first + i) * scale;
      const double end = std::min(double(first + i + 1) * scale, double(inputs));
      start[i] = int64_t(begin);
      for (int64_t j = start[i]; j < std::min(start[i] + most, inputs) && double(j) < end; ++j) {
        const double covered = std::min(end, double(j + 1)) - std::max(begin, double(j));
        shares[i * most + taps[i]++] = float(covered / scale);
      }
    }
  }
  int64_t low() const { return start.front(); }
  int64_t high() const { return start.back() + taps.back(); }
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

// Pixels of a line of sums, one by one to `to`, `step` bytes further each time.
template <int64_t kMost>
void Across(const Cover& across, const float* line, int64_t side, uint8_t* to, int64_t step) {
  const int64_t most = kMost ? kMost : across.most, low = across.low();
  const float* shares = across.shares.data();
  for (int64_t column = 0; column < side; ++column, shares += most, to += step) {
    const float* input = line + kChannels * (across.start[column] - low);
    Pixel sum{};
    for (int64_t tap = 0; tap < most; ++tap, input += kChannels) {
      Pixel pixel;
      std::memcpy(&pixel, input, sizeof(pixel));
      sum += shares[tap] * pixel;
    }
    // The nearest whole number, of two the even one, in the last bits of the sum.
    sum += 8388608.0f;
    int32_t bits[4];
    std::memcpy(bits, &sum, sizeof(bits));
    for (int64_t channel = 0; channel < kChannels; ++channel) to[channel] = uint8_t(bits[channel]);
  }
}

}  // namespace

extern "C" {

// How often a pattern of `size` bytes is found in `length` bytes.
int64_t count(const uint8_t* data, int64_t length, const char* pattern, int64_t size) {
  return Count(data, length, pattern, size);
}

// A window of `rows` times `columns` pixels; pitches are the bytes from row to row.
void copy(const uint8_t* from, int64_t pitch, uint8_t* to, int64_t to_pitch, int64_t rows,
          int64_t columns, int64_t mirror) {
  for (int64_t row = 0; row < rows; ++row, from += pitch, to += to_pitch) {
    if (mirror) {
      Mirror(from, to, columns);
    } else {
      std::memcpy(to, from, kChannels * columns);
    }
  }
}

// A window of `side` times `side` pixels at (top, left) of the image of (height, width) shrunk to
// (tall, wide), each output pixel the mean of the area it covers.
void shrink(const uint8_t* from, int64_t pitch, int64_t height, int64_t width, int64_t tall,
            int64_t wide, int64_t top, int64_t left, int64_t side, int64_t mirror, uint8_t* to,
            int64_t to_pitch) {
  if (side <= 0) return;
  const Cover down(height, tall, top, side), across(width, wide, left, side);
  const int64_t low = across.low(), count = kChannels * (across.high() - low);
  std::vector<float> line(count + kChannels * across.most + 1);
  for (int64_t row = 0; row < side; ++row, to += to_pitch) {
    const uint8_t* input = from + down.start[row] * pitch + kChannels * low;
    Down(input, pitch, down.shares.data() + row * down.most, down.taps[row], line.data(), count);
    uint8_t* pixel = mirror ? to + kChannels * (side - 1) : to;
    const int64_t step = mirror ? -kChannels : kChannels;
    switch (across.most) {
      case 2: Across<2>(across, line.data(), side, pixel, step); break;
      case 3: Across<3>(across, line.data(), side, pixel, step); break;
      case 4: Across<4>(across, line.data(), side, pixel, step); break;
      default: Across<0>(across, line.data(), side, pixel, step);
    }
  }
}

}  // extern "C"
