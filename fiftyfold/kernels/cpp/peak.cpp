// What this processor can do at most with the instructions of the path in use; for benchmarks.
#include <time.h>

#include <atomic>

#include "api.h"
#include "paths.h"
#include "threads.h"

namespace fiftyfold {
namespace {

double seconds() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace
}  // namespace fiftyfold

double ff_peak(int32_t threads, int64_t rounds) {
  using namespace fiftyfold;
  const Path& path = current_path();
  if (!path.spin) return 0;
  std::atomic<int64_t> operations{0};
  auto spin = [&](int64_t) { operations += path.spin(rounds); };
  const double begin = seconds();
  for_each_task(threads, spin);
  return static_cast<double>(operations) / (seconds() - begin);
}

double ff_read_bandwidth(int32_t threads, const uint8_t* bytes, int64_t size) {
  using namespace fiftyfold;
  std::atomic<uint64_t> sink{0};
  auto read = [&](int64_t t) {
    const int64_t begin = size / threads * t / 64 * 64, end = size / threads * (t + 1) / 64 * 64;
    uint64_t sums[8] = {};
    for (int64_t i = begin; i < end; i += 64) {
      uint64_t words[8];
      std::memcpy(words, bytes + i, sizeof words);
      for (int w = 0; w < 8; w++) sums[w] += words[w];
    }
    sink += sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
  };
  const double begin = seconds();
  for_each_task(threads, read);
  return static_cast<double>(size) / (seconds() - begin);
}
