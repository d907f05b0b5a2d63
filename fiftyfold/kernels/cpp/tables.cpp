// Products by tables, on all threads.
#include <algorithm>
#include <vector>

#include "api.h"
#include "paths.h"
#include "scratch.h"
#include "threads.h"

namespace fiftyfold {
namespace {

constexpr int64_t kLeastInputs = 256;  // of a part, beside whose sums filling its tables costs little

int64_t groups(int64_t outputs, int32_t bits) {
  return bits == 1 ? Tables<1>::groups(outputs) : Tables<2>::groups(outputs);
}

int64_t group_bytes(int64_t inputs, int32_t bits) {
  return inputs * (bits == 1 ? Tables<1>::kTables : Tables<2>::kTables);
}

void multiply(const RowsCall& call) {
  const int64_t blocks = (call.tokens + kManyRows - 1) / kManyRows;
  // Each part of the inputs fills all tables again, so there are no more parts than there are idle threads for.
  const int64_t idle = thread_count() / std::max<int64_t>(1, blocks);
  const int64_t most = std::max<int64_t>(1, least(idle, call.inputs / kLeastInputs));
  const int64_t part = std::max<int64_t>(8, ((call.inputs + most - 1) / most + 7) / 8 * 8);
  const int64_t parts = (call.inputs + part - 1) / part;
  auto task = [&](int64_t t) {
    thread_local Scratch scratch;
    const int64_t row = t / parts * kManyRows, input = t % parts * part;
    const Piece piece{row, least(kManyRows, call.tokens - row), input, least(part, call.inputs - input)};
    uint8_t* memory = scratch.reserve(static_cast<size_t>(rows_scratch(part)));
    current_path().floats.multiply[call.bits - 1](call, piece, reinterpret_cast<float*>(memory));
  };
  for_each_task(blocks * parts, task);
}

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
  fiftyfold::multiply({rows, tokens, outputs, inputs, entries, scale, per_tensor, bits, y});
}

int64_t ff_tabled_bytes(int64_t outputs, int64_t inputs, int32_t bits) {
  return ff_entries_bytes(inputs, outputs, bits) + fiftyfold::kBlockBytes;
}

void ff_arrange_for_tables(const int8_t* codes, int64_t outputs, int64_t inputs, int32_t bits, uint8_t* to) {
  using namespace fiftyfold;
  constexpr int64_t kSome = 64;
  std::vector<int8_t> turned(static_cast<size_t>(outputs * inputs));
  auto turn = [&](int64_t part) {
    for (int64_t k = 0; k < inputs; k++) {
      for (int64_t o = part * kSome; o < least((part + 1) * kSome, outputs); o++) {
        turned[static_cast<size_t>(k * outputs + o)] = codes[o * inputs + k];
      }
    }
  };
  for_each_task((outputs + kSome - 1) / kSome, turn);
  ff_find_entries(turned.data(), inputs, outputs, bits, to);
  const Label label{outputs, inputs, 1, bits, Label::kTables, {}};
  std::memcpy(to + ff_entries_bytes(inputs, outputs, bits), &label, sizeof label);
}

void ff_table_linear(
    const float* x, int64_t tokens, int64_t inputs, int64_t outputs, int32_t bits, const uint8_t* weight,
    const float* scale, const float* bias, float* y) {
  constexpr uint16_t kOne = 0x3c00;  // in float16
  fiftyfold::multiply({x, tokens, inputs, outputs, weight, &kOne, 1, bits, y, scale, bias});
}
