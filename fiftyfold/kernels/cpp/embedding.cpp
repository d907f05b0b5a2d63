// The packed embedding: rows of the matrix as it is stored, see fiftyfold/kernels/packing.py.
#include <cstring>
#include <vector>

#include "api.h"
#include "floats.h"
#include "threads.h"

namespace fiftyfold {
namespace {

constexpr int64_t kSerialEntries = 65536;

// The codes in each byte that packing writes.
struct Table {
  int8_t codes[256][8];
  int values, digits;

  explicit Table(int bits) : codes(), values(bits == 2 ? 243 : 256), digits(bits == 2 ? 5 : 8) {
    for (int byte = 0; byte < values; byte++) {
      for (int digit = 0, rest = byte; digit < digits; digit++, rest /= bits + 1) {
        codes[byte][digit] = static_cast<int8_t>(bits == 2 ? rest % 3 - 1 : rest % 2 * 2 - 1);
      }
    }
  }
};

const Table& table_for(int bits) {
  static const Table binary(1), ternary(2);
  return bits == 1 ? binary : ternary;
}

void write_row(const int8_t* codes, float scale, int64_t n, FloatType type, void* to) {
  if (type == FloatType::float32) {
    float* values = static_cast<float*>(to);
    for (int64_t i = 0; i < n; i++) values[i] = static_cast<float>(codes[i]) * scale;
    return;
  }
  const float values[3] = {-1.0f * scale, 0.0f * scale, 1.0f * scale};
  uint16_t halves[3];
  write_floats(values, 3, type, halves);
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; i++) out[i] = codes[i] < 0 ? halves[0] : codes[i] > 0 ? halves[2] : halves[1];
}

// Unpacks a row; false if a byte is none that packing writes.
bool read_row(const FfEmbedding& call, int64_t row, int8_t* codes, int64_t* skipped) {
  const Table& table = table_for(call.bits);
  const int64_t first = row * call.columns, end = first + call.columns;
  const uint8_t* from = call.packed + first / table.digits;
  const int64_t bytes = (end + table.digits - 1) / table.digits - first / table.digits;
  int largest = 0;
  for (int64_t i = 0; i < bytes; i++) {
    largest = from[i] > largest ? from[i] : largest;
    std::memcpy(codes + i * table.digits, table.codes[from[i]], 8);
  }
  *skipped = first % table.digits;
  return largest < table.values;
}

int32_t look_up(const FfEmbedding& call, int64_t begin, int64_t end) {
  const FloatType type = static_cast<FloatType>(call.float_type);
  std::vector<int8_t> codes(static_cast<size_t>(call.columns) + 24);
  for (int64_t i = begin; i < end; i++) {
    int64_t skipped;
    if (!read_row(call, call.tokens[i], codes.data(), &skipped)) return 2;
    uint8_t* to = static_cast<uint8_t*>(call.y) + i * call.columns * size_of(type);
    write_row(codes.data() + skipped, from_float16(call.scale[call.tokens[i]]), call.columns, type, to);
  }
  return 0;
}

}  // namespace
}  // namespace fiftyfold

int32_t ff_embedding(const FfEmbedding* call) {
  for (int64_t i = 0; i < call->count; i++) {
    if (call->tokens[i] < 0 || call->tokens[i] >= call->rows) return 1;
  }
  const int threads = call->count * call->columns < fiftyfold::kSerialEntries ? 1 : fiftyfold::thread_count();
  std::vector<int32_t> status(static_cast<size_t>(threads));
  auto share = [&](int64_t t) {
    status[static_cast<size_t>(t)] =
        fiftyfold::look_up(*call, call->count * t / threads, call->count * (t + 1) / threads);
  };
  fiftyfold::for_each_task(threads, share);
  for (const int32_t one : status) {
    if (one) return one;
  }
  return 0;
}
