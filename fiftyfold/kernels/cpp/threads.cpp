#include "threads.h"

#include <pthread.h>

#include <atomic>

namespace fiftyfold {
namespace {

ParallelFor parallel_for = nullptr;
ThreadCount count_threads = nullptr;
std::atomic<bool> forked{false};

struct Tasks {
  void (*function)(int64_t, void*);
  void* context;
};

void run_range(int64_t begin, int64_t end, void* context) {
  const Tasks& tasks = *static_cast<Tasks*>(context);
  for (int64_t task = begin; task < end; task++) tasks.function(task, tasks.context);
}

}  // namespace

void use_threads(ParallelFor function, ThreadCount count) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  if (registered != 0) return;
  count_threads = count;
  parallel_for = function;
}

void compute_alone() { forked = true; }

int thread_count() {
  uint32_t count = 1;
  if (!parallel_for || forked || count_threads(&count) != 0) return 1;
  return static_cast<int>(count);
}

void for_each_task(int64_t tasks, void (*function)(int64_t, void*), void* context) {
  Tasks all{function, context};
  const bool alone = tasks <= 1 || !parallel_for || forked;
  if (alone || parallel_for(0, tasks, 1, run_range, &all) != 0) run_range(0, tasks, &all);
}

}  // namespace fiftyfold
