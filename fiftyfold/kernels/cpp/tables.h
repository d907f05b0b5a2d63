// Rows of float32 times a weight of 1 or 2 bits, by tables: the product that takes gradients back through a layer.
//
// Few codes have few sums: a table holds, for some neighbouring outputs, what any codes of theirs make of a row's
// entries. An addition then stands for as many products as a table has outputs. Lanes are rows, so the order of
// additions, and with it every bit, is the same for all instruction sets and numbers of threads.
#pragma once
#include <cstring>

#include "floats.h"

namespace fiftyfold {

struct RowsCall {
  const float* rows;  // tokens x outputs
  int64_t tokens, outputs, inputs;
  const uint8_t* entries;  // groups of tables x inputs x tables: which entry of a table an input's codes are
  const uint16_t* scale;   // float16, one for each output, or one
  int32_t per_tensor, bits;
  float* y;  // tokens x inputs
};

constexpr int kRows = 32;        // at once
constexpr int kWritten = 16;     // inputs of a row that are written at once
constexpr int kVectorSize = 32;  // bytes
constexpr int kVectors = kRows * 4 / kVectorSize;

typedef float Vector __attribute__((vector_size(kVectorSize), may_alias));

template <int kBits>
struct Tables {
  static constexpr int kDigits = kBits + 1;              // codes that a weight may have
  static constexpr int kOutputs = kBits == 1 ? 4 : 3;    // that a table stands for
  static constexpr int kEntries = kBits == 1 ? 16 : 27;  // of a table: kDigits to the power of kOutputs
  static constexpr int kTables = kBits == 1 ? 12 : 7;    // of a group, which takes 24 KiB
  static constexpr int kSize = kEntries * kRows;         // floats of a table
  static constexpr int kGroupOutputs = kTables * kOutputs;
  static float code(int digit) { return static_cast<float>(kBits == 1 ? 2 * digit - 1 : digit - 1); }
  static int64_t groups(int64_t outputs) { return (outputs + kGroupOutputs - 1) / kGroupOutputs; }
};

inline int64_t rows_scratch(int64_t inputs) {
  constexpr int binary = Tables<1>::kTables * Tables<1>::kSize, ternary = Tables<2>::kTables * Tables<2>::kSize;
  return (inputs * kRows + (binary > ternary ? binary : ternary)) * 4;
}

// Which entries of a group's tables each input's codes are; outputs that are not there count as the lowest code.
template <int kBits>
static FF_INLINE void find_entries(
    const int8_t* codes, int64_t outputs, int64_t inputs, int64_t group, uint8_t* entries) {
  using T = Tables<kBits>;
  constexpr int kSome = 256;  // inputs, so that each table's lie side by side first
  for (int64_t begin = 0; begin < inputs; begin += kSome) {
    const int count = static_cast<int>(inputs - begin < kSome ? inputs - begin : kSome);
    uint8_t found[T::kTables][kSome] = {};
    for (int64_t i = 0; i < T::kGroupOutputs && group * T::kGroupOutputs + i < outputs; i++) {
      const int8_t* row = codes + (group * T::kGroupOutputs + i) * inputs + begin;
      uint8_t* to = found[i / T::kOutputs];
      int factor = 1;
      for (int64_t before = i % T::kOutputs; before > 0; before--) factor *= T::kDigits;
      for (int k = 0; k < count; k++) {
        const int digit = kBits == 1 ? row[k] > 0 : row[k] + 1;
        to[k] = static_cast<uint8_t>(to[k] + digit * factor);
      }
    }
    for (int k = 0; k < count; k++) {
      for (int table = 0; table < T::kTables; table++) entries[(begin + k) * T::kTables + table] = found[table][k];
    }
  }
}

// The entries of some rows for a group's outputs, scaled and transposed; zeros for what is not there.
template <int kBits>
static FF_INLINE void read_rows(const RowsCall& call, int64_t first, int64_t rows, int64_t group, float* values) {
  using T = Tables<kBits>;
  const int64_t begin = group * T::kGroupOutputs, left = call.outputs - begin;
  const int64_t outputs = left < T::kGroupOutputs ? left : T::kGroupOutputs;
  float scale[T::kGroupOutputs];
  for (int64_t i = 0; i < outputs; i++) scale[i] = from_float16(call.scale[call.per_tensor ? 0 : begin + i]);
  std::memset(values, 0, sizeof(float) * kRows * T::kGroupOutputs);
  for (int64_t t = 0; t < rows; t++) {
    const float* from = call.rows + (first + t) * call.outputs + begin;
    for (int64_t i = 0; i < outputs; i++) values[i * kRows + t] = from[i] * scale[i];
  }
}

// Multiplies by all codes, 0 as well, so that what is not finite shows as it does in a product.
template <int kBits>
static FF_INLINE void fill_table(const float* values, float* table) {
  using T = Tables<kBits>;
  Vector* to = reinterpret_cast<Vector*>(table);
  for (int v = 0; v < kVectors; v++) to[v] = Vector{};
  int filled = 1;
#pragma GCC unroll 4
  for (int i = 0; i < T::kOutputs; i++, filled *= T::kDigits) {
    const Vector* value = reinterpret_cast<const Vector*>(values + i * kRows);
    for (int entry = 0; entry < filled; entry++) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        const Vector from = to[entry * kVectors + v], added = value[v];
        for (int digit = 0; digit < T::kDigits; digit++) {
          to[(entry + digit * filled) * kVectors + v] = from + T::code(digit) * added;
        }
      }
    }
  }
}

// Adds to the sums of kInputs neighbouring inputs what a group's tables hold for their codes.
template <int kBits, int kInputs>
static FF_INLINE void add_entries(const float* tables, const uint8_t* entries, float* sums) {
  using T = Tables<kBits>;
  Vector* to = reinterpret_cast<Vector*>(sums);
  Vector sum[kInputs][kVectors];
  for (int k = 0; k < kInputs; k++) {
    for (int v = 0; v < kVectors; v++) sum[k][v] = to[k * kVectors + v];
  }
#pragma GCC unroll 12
  for (int table = 0; table < T::kTables; table++) {
    for (int k = 0; k < kInputs; k++) {
      const float* entry = tables + table * T::kSize + entries[k * T::kTables + table] * kRows;
      for (int v = 0; v < kVectors; v++) sum[k][v] += reinterpret_cast<const Vector*>(entry)[v];
    }
  }
  for (int k = 0; k < kInputs; k++) {
    for (int v = 0; v < kVectors; v++) to[k * kVectors + v] = sum[k][v];
  }
}

// Computes `rows` rows, at most kRows, from `first` on; `scratch` holds rows_scratch bytes.
template <int kBits>
static FF_INLINE void multiply_rows(const RowsCall& call, int64_t first, int64_t rows, float* scratch) {
  using T = Tables<kBits>;
  constexpr int kInputs = 3;  // sums that fit into registers, enough to hide how long an addition takes
  alignas(64) float values[T::kGroupOutputs * kRows];
  float* sums = scratch;
  float* tables = scratch + call.inputs * kRows;
  std::memset(sums, 0, static_cast<size_t>(call.inputs) * kRows * sizeof(float));
  for (int64_t group = 0; group < T::groups(call.outputs); group++) {
    read_rows<kBits>(call, first, rows, group, values);
    for (int table = 0; table < T::kTables; table++) {
      fill_table<kBits>(values + table * T::kOutputs * kRows, tables + table * T::kSize);
    }
    const uint8_t* entries = call.entries + group * call.inputs * T::kTables;
    int64_t k = 0;
    for (; k + kInputs <= call.inputs; k += kInputs) {
      add_entries<kBits, kInputs>(tables, entries + k * T::kTables, sums + k * kRows);
    }
    for (; k < call.inputs; k++) add_entries<kBits, 1>(tables, entries + k * T::kTables, sums + k * kRows);
  }
  for (int64_t from = 0; from < call.inputs; from += kWritten) {
    const int64_t to = from + kWritten < call.inputs ? from + kWritten : call.inputs;
    for (int64_t t = 0; t < rows; t++) {
      float* y = call.y + (first + t) * call.inputs;
      for (int64_t k = from; k < to; k++) y[k] = sums[k * kRows + t];
    }
  }
}

}  // namespace fiftyfold
