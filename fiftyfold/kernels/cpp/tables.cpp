// Products by tables: which instruction set computes them, on how many threads.
#include "tables.h"

#include "api.h"
#include "scratch.h"
#include "threads.h"

namespace fiftyfold {
namespace {

// What each instruction set compiles.
struct Products {
  void (*multiply[2])(const RowsCall&, int64_t first, int64_t rows, float* scratch);
  void (*entries[2])(const int8_t* codes, int64_t outputs, int64_t inputs, int64_t group, uint8_t* entries);
};

#define FF_PRODUCTS(NAME, TARGET)                                                                                     \
  namespace NAME {                                                                                                    \
  TARGET void multiply_binary(const RowsCall& call, int64_t first, int64_t rows, float* scratch) {                    \
    multiply_rows<1>(call, first, rows, scratch);                                                                     \
  }                                                                                                                   \
  TARGET void multiply_ternary(const RowsCall& call, int64_t first, int64_t rows, float* scratch) {                   \
    multiply_rows<2>(call, first, rows, scratch);                                                                     \
  }                                                                                                                   \
  TARGET void binary_entries(const int8_t* codes, int64_t outputs, int64_t inputs, int64_t group, uint8_t* entries) { \
    find_entries<1>(codes, outputs, inputs, group, entries);                                                          \
  }                                                                                                                   \
  TARGET void ternary_entries(                                                                                        \
      const int8_t* codes, int64_t outputs, int64_t inputs, int64_t group, uint8_t* entries) {                        \
    find_entries<2>(codes, outputs, inputs, group, entries);                                                          \
  }                                                                                                                   \
  const Products kProducts{{multiply_binary, multiply_ternary}, {binary_entries, ternary_entries}};                   \
  }

FF_PRODUCTS(portable, )
#if defined(__x86_64__)
FF_PRODUCTS(avx2, __attribute__((target("avx2"))))
#endif
#undef FF_PRODUCTS

const Products& products() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool wide = __builtin_cpu_supports("avx2");
  return wide ? avx2::kProducts : portable::kProducts;
#else
  return portable::kProducts;
#endif
}

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
    fiftyfold::products().entries[bits - 1](codes, outputs, inputs, group, to);
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
    products().multiply[bits - 1](call, first, count, reinterpret_cast<float*>(memory));
  };
  for_each_task((tokens + kRows - 1) / kRows, task);
}
