// Rows of float32 times a weight of 1 or 2 bits, by tables: the product that takes gradients back through a layer, and
// that of a layer whose inputs are not quantized.
//
// Few codes have few sums: a table holds, for some neighbouring outputs, what any codes of theirs make of a row's
// entries. An addition then stands for as many products as a table has outputs. Lanes are rows, so the order of
// additions, and with it every bit, is the same for vectors of any length and any number of threads.
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
  const float* factor = nullptr;  // of each column of y, or null
  const float* bias = nullptr;    // added to each, after that, or null
};

constexpr int kManyRows = 32, kFewRows = 8;  // at once

// Vectors may be read and written where there are floats.
typedef float EightFloats __attribute__((vector_size(32)));
typedef float SixteenFloats __attribute__((vector_size(64)));
typedef float UnalignedFloats __attribute__((vector_size(32), aligned(4)));
typedef int32_t EightNumbers __attribute__((vector_size(32)));

template <int kRows, typename Floats>
constexpr int kVectors = kRows * sizeof(float) / sizeof(Floats);

#ifdef __clang__
#define FF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, EightNumbers{__VA_ARGS__})
#endif

// Transposes 8 x 8 floats.
static FF_INLINE void transpose(EightFloats (&rows)[8]) {
  EightFloats pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = FF_SHUFFLE(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = FF_SHUFFLE(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
#pragma GCC unroll 2
    for (int i = half; i < half + 2; i++) {
      fours[2 * i - half] = FF_SHUFFLE(pairs[i], pairs[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[2 * i - half + 1] = FF_SHUFFLE(pairs[i], pairs[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    rows[i] = FF_SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = FF_SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

template <int kBits>
struct Tables {
  static constexpr int kDigits = kBits + 1;              // codes that a weight may have
  static constexpr int kOutputs = kBits == 1 ? 4 : 3;    // that a table stands for
  static constexpr int kEntries = kBits == 1 ? 16 : 27;  // of a table: kDigits to the power of kOutputs
  static constexpr int kTables = kBits == 1 ? 12 : 8;    // of a group, which takes 24 or 27 KiB
  static constexpr int kGroupOutputs = kTables * kOutputs;
  static float code(int digit) { return static_cast<float>(kBits == 1 ? 2 * digit - 1 : digit - 1); }
  static int64_t groups(int64_t outputs) { return (outputs + kGroupOutputs - 1) / kGroupOutputs; }
};

// The rows and inputs whose products one thread computes at once.
struct Piece {
  int64_t first_row, rows;  // at most kManyRows
  int64_t first_input, inputs;
};

// Bytes of a piece's scratch memory.
inline int64_t rows_scratch(int64_t inputs) {
  constexpr int binary = Tables<1>::kTables * Tables<1>::kEntries, ternary = Tables<2>::kTables * Tables<2>::kEntries;
  return (inputs + (binary > ternary ? binary : ternary)) * kManyRows * 4;
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
template <int kBits, int kRows>
static FF_INLINE void read_rows(const RowsCall& call, const Piece& piece, int64_t group, float* values) {
  using T = Tables<kBits>;
  const int64_t begin = group * T::kGroupOutputs, left = call.outputs - begin;
  const int64_t outputs = left < T::kGroupOutputs ? left : T::kGroupOutputs;
  const float* from = call.rows + piece.first_row * call.outputs + begin;
  const auto scale = [&](int64_t i) { return from_float16(call.scale[call.per_tensor ? 0 : begin + i]); };
  std::memset(values, 0, sizeof(float) * kRows * T::kGroupOutputs);
  const int64_t whole = piece.rows == kRows ? outputs / 8 * 8 : 0;
  for (int64_t i = 0; i < whole; i += 8) {
    for (int64_t t = 0; t < kRows; t += 8) {
      EightFloats block[8];
      for (int k = 0; k < 8; k++) {
        block[k] = *reinterpret_cast<const UnalignedFloats*>(from + (t + k) * call.outputs + i);
      }
      transpose(block);
      for (int k = 0; k < 8; k++) {
        *reinterpret_cast<EightFloats*>(values + (i + k) * kRows + t) = block[k] * scale(i + k);
      }
    }
  }
  for (int64_t i = whole; i < outputs; i++) {
    for (int64_t t = 0; t < piece.rows; t++) values[i * kRows + t] = from[t * call.outputs + i] * scale(i);
  }
}

// Writes some rows' sums, which lie transposed.
template <int kRows>
static FF_INLINE void write_rows(const RowsCall& call, const Piece& piece, const float* sums) {
  float* y = call.y + piece.first_row * call.inputs + piece.first_input;
  const float* factor = call.factor ? call.factor + piece.first_input : nullptr;
  const float* bias = call.bias ? call.bias + piece.first_input : nullptr;
  const int64_t whole = piece.rows == kRows ? piece.inputs / 8 * 8 : 0;
  for (int64_t i = 0; i < whole; i += 8) {
    for (int64_t t = 0; t < kRows; t += 8) {
      EightFloats block[8];
      for (int k = 0; k < 8; k++) block[k] = *reinterpret_cast<const EightFloats*>(sums + (i + k) * kRows + t);
      transpose(block);
      for (int k = 0; k < 8; k++) {
        EightFloats value = block[k];
        if (factor) value *= *reinterpret_cast<const UnalignedFloats*>(factor + i);
        if (bias) value += *reinterpret_cast<const UnalignedFloats*>(bias + i);
        *reinterpret_cast<UnalignedFloats*>(y + (t + k) * call.inputs + i) = value;
      }
    }
  }
  for (int64_t i = whole; i < piece.inputs; i++) {
    for (int64_t t = 0; t < piece.rows; t++) {
      const float value = factor ? sums[i * kRows + t] * factor[i] : sums[i * kRows + t];
      y[t * call.inputs + i] = bias ? value + bias[i] : value;
    }
  }
}

// Multiplies by all codes, 0 as well, so that what is not finite shows as it does in a product.
template <int kBits, int kRows, typename Floats>
static FF_INLINE void fill_table(const float* values, float* table) {
  using T = Tables<kBits>;
  Floats* to = reinterpret_cast<Floats*>(table);
  for (int v = 0; v < kVectors<kRows, Floats>; v++) to[v] = Floats{};
  int filled = 1;
#pragma GCC unroll 4
  for (int i = 0; i < T::kOutputs; i++, filled *= T::kDigits) {
    const Floats* value = reinterpret_cast<const Floats*>(values + i * kRows);
    for (int entry = 0; entry < filled; entry++) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors<kRows, Floats>; v++) {
        const Floats from = to[entry * kVectors<kRows, Floats> + v], added = value[v];
        for (int digit = 0; digit < T::kDigits; digit++) {
          to[(entry + digit * filled) * kVectors<kRows, Floats> + v] = from + T::code(digit) * added;
        }
      }
    }
  }
}

// Adds to the sums of kInputs neighbouring inputs what a group's tables hold for their codes.
template <int kBits, int kRows, typename Floats, int kInputs>
static FF_INLINE void add_entries(const float* tables, const uint8_t* entries, float* sums) {
  using T = Tables<kBits>;
  Floats* to = reinterpret_cast<Floats*>(sums);
  Floats sum[kInputs][kVectors<kRows, Floats>];
  for (int k = 0; k < kInputs; k++) {
    for (int v = 0; v < kVectors<kRows, Floats>; v++) sum[k][v] = to[k * kVectors<kRows, Floats> + v];
  }
#pragma GCC unroll 12
  for (int table = 0; table < T::kTables; table++) {
    for (int k = 0; k < kInputs; k++) {
      const size_t place = static_cast<size_t>(entries[k * T::kTables + table]) * kRows;
      const Floats* entry = reinterpret_cast<const Floats*>(tables + table * T::kEntries * kRows + place);
      for (int v = 0; v < kVectors<kRows, Floats>; v++) sum[k][v] += entry[v];
      // Otherwise the compiler finds all addresses first, and has no registers to keep them in.
      asm volatile("" ::: "memory");
    }
  }
  for (int k = 0; k < kInputs; k++) {
    for (int v = 0; v < kVectors<kRows, Floats>; v++) to[k * kVectors<kRows, Floats> + v] = sum[k][v];
  }
}

template <int kBits, int kRows, typename Floats>
static FF_INLINE void multiply_piece(const RowsCall& call, const Piece& piece, float* scratch) {
  using T = Tables<kBits>;
  // Whose sums hide how long an addition takes, and fit into all registers but SSE's.
  constexpr int kInputs = 12 / kVectors<kRows, Floats>;
  alignas(64) float values[T::kGroupOutputs * kRows];
  float* sums = scratch;
  float* tables = scratch + piece.inputs * kRows;
  std::memset(sums, 0, static_cast<size_t>(piece.inputs) * kRows * sizeof(float));
  for (int64_t group = 0; group < T::groups(call.outputs); group++) {
    read_rows<kBits, kRows>(call, piece, group, values);
    for (int table = 0; table < T::kTables; table++) {
      const float* from = values + table * T::kOutputs * kRows;
      fill_table<kBits, kRows, Floats>(from, tables + table * T::kEntries * kRows);
    }
    const uint8_t* entries = call.entries + (group * call.inputs + piece.first_input) * T::kTables;
    int64_t k = 0;
    for (; k + kInputs <= piece.inputs; k += kInputs) {
      add_entries<kBits, kRows, Floats, kInputs>(tables, entries + k * T::kTables, sums + k * kRows);
    }
    for (; k < piece.inputs; k++) {
      add_entries<kBits, kRows, Floats, 1>(tables, entries + k * T::kTables, sums + k * kRows);
    }
  }
  write_rows<kRows>(call, piece, sums);
}

// Computes a piece; `scratch` holds the bytes that rows_scratch tells. Sums of few rows are those of many, bit for bit.
template <int kBits, typename Floats>
static FF_INLINE void multiply_rows(const RowsCall& call, const Piece& piece, float* scratch) {
  if (piece.rows <= kFewRows) multiply_piece<kBits, kFewRows, EightFloats>(call, piece, scratch);
  else multiply_piece<kBits, kManyRows, Floats>(call, piece, scratch);
}

// What an instruction set compiles of it; by bits, less one.
struct TableProducts {
  void (*multiply[2])(const RowsCall&, const Piece&, float* scratch);
  void (*find_entries[2])(const int8_t* codes, int64_t outputs, int64_t inputs, int64_t group, uint8_t* entries);
};

#define FF_DEFINE_TABLE_PRODUCTS(target, Floats)                                                     \
  template <int kBits>                                                                               \
  target static void multiply_by_tables(const RowsCall& call, const Piece& piece, float* scratch) {  \
    fiftyfold::multiply_rows<kBits, Floats>(call, piece, scratch);                                   \
  }                                                                                                  \
  template <int kBits>                                                                               \
  target static void find_group_entries(                                                             \
      const int8_t* codes, int64_t outputs, int64_t inputs, int64_t group, uint8_t* entries) {       \
    fiftyfold::find_entries<kBits>(codes, outputs, inputs, group, entries);                          \
  }                                                                                                  \
  static constexpr TableProducts kTableProducts{                                                     \
      {multiply_by_tables<1>, multiply_by_tables<2>}, {find_group_entries<1>, find_group_entries<2>}};

}  // namespace fiftyfold
