// Reused memory, and work in parts on XLA's threads.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Input = ffi::Buffer<ffi::F32>;
using Output = ffi::Result<ffi::Buffer<ffi::F32>>;

// Memory that the next call reuses: fresh memory costs a page fault every 4 KiB.
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
    size_t count = 0;  // of all ever allocated
  };
  static Spare& Spares() {
    static Spare* spare = new Spare;  // never destroyed: a step may run while the process ends
    return *spare;
  }
  int64_t size_;
  float* data_;
};

// XLA allocates fresh memory for every step. With pages of 2 MiB the first touch is cheaper, and so
// is every later access.
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

// Calls work(0) to work(count - 1) on XLA's threads and this one, and returns when all are done,
// or rethrows the exception of the first part that failed. A thread of the pool that comes late
// finds nothing left; nobody waits for it.
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

}  // namespace
