// Vectors of floats, of the processor's width.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

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

}  // namespace
