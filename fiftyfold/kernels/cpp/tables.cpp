// Products by tables, on all threads.
#include "api.h"
#include "paths.h"
#include "scratch.h"
#include "threads.h"

namespace fiftyfold {
namespace {

int64_t groups(int64_t outputs, int32_t bits) {
  return bits == 1 ? Tables<1>::groups(outputs) : Tables<2>::groups(outputs);
}

int64_t group_bytes(int64_t inputs, int32_t bits) { return inputs * (bits == 1 ? Tables<1>::kTables : Tables<2>::kTables); }

}  // namespace
}  // namespace fiftyfold

int64_t ff_entries_bytes(int64_t outputs, int64_t inputs, int32_t bits) {
  return fiftyfold::groups(outputs, bits) * fiftyfold::group_bytes(inputs, bits);
}

void ff_find_entries(const int8_t* codes, int64_t outputs, int64_t inputs, int32_t bits, uint8_t* entries) {
  auto task = [&](int64_t group) {
    uint8_t* to = entries + group * fiftyfold::group_bytes(inputs, bits);
    fiftyfold::current_path().floats.find_entries[bits - 1](codes, outputs, inputs, group, to);
  };
  fiftyfold::for_each_task(fiftyfold::groups(outputs, bits), task);
}

void ff_multiply_rows(
    const float* rows, int64_t tokens, int64_t outputs, int64_t inputs, int32_t bits, const uint8_t* entries,
    const uint16_t* scale, int32_t per_tensor, float* y) {
  using namespace fiftyfold;
  const RowsCall call{rows, tokens, outputs, inputs, entries, scale, per_tensor, bits, y};
  auto task = [&](int64_t t) {
    thread_local Scratch scratch;
    const int64_t first = t * kRows, count = tokens - first < kRows ? tokens - first : kRows;
    uint8_t* memory = scratch.reserve(static_cast<size_t>(rows_scratch(inputs)));
    current_path().floats.multiply[bits - 1](call, first, count, reinterpret_cast<float*>(memory));
  };
  for_each_task((tokens + kRows - 1) / kRows, task);
}
