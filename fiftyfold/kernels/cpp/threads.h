// torch's thread pool, and no other: its functions are handed over when the library is loaded.
#pragma once
#include <cstdint>

namespace fiftyfold {

// As declared by torch/csrc/stable/c/shim.h, which is stable across versions of torch.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void* context);
using ThreadCount = int32_t (*)(uint32_t* count);

void use_threads(ParallelFor parallel_for, ThreadCount count);

// How many threads may work now: 1 in a process that was forked, whose copy of the pool has no threads.
int thread_count();

// From now on.
void compute_alone();

// Calls `function(0) ... function(tasks - 1)`, spread over the threads.
void for_each_task(int64_t tasks, void (*function)(int64_t task, void* context), void* context);

template <class Function>
void for_each_task(int64_t tasks, Function& function) {
  for_each_task(tasks, [](int64_t task, void* context) { (*static_cast<Function*>(context))(task); }, &function);
}

}  // namespace fiftyfold
