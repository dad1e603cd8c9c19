// The update of weights, in one pass over memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include "parallel.h"

namespace {

// The paper's update, in place, unless `moves` is false:
//   velocity = momentum * velocity - rate * (gradient + decay * weight),  weight += velocity
// squares: the sums of squares of the update and of the old weights; zeros if nothing is updated.
ffi::Error Update(ffi::ThreadPool pool, Input weights, Input velocity, Input gradient, Input rate,
                  ffi::Buffer<ffi::PRED> moves, Output new_weights, Output new_velocity,
                  Output squares, float momentum, float decay) {
  constexpr int64_t kPart = 1 << 15;
  const int64_t count = weights.element_count(), parts = Parts(count, kPart);
  float* sums = squares->typed_data();
  sums[0] = sums[1] = 0;
  float *w = new_weights->typed_data(), *v = new_velocity->typed_data();
  // XLA may have chosen to copy them instead of aliasing them.
  if (w != weights.typed_data()) std::memcpy(w, weights.typed_data(), 4 * count);
  if (v != velocity.typed_data()) std::memcpy(v, velocity.typed_data(), 4 * count);
  if (!moves.typed_data()[0]) return ffi::Error::Success();
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

}  // namespace
