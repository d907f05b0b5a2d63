// Intel's AMX: eight tiles of up to 16 rows of 64 bytes, and products of them; with FF_EMULATED in plain C.
//
// Written as assembly: GCC 12's intrinsics do not tell the compiler that they read memory.
#pragma once
#include <cstdint>
#include <cstring>

namespace fiftyfold {
namespace tiles {

constexpr int kRows = 16, kRowBytes = 64, kBytes = kRows * kRowBytes, kCount = 8;

// What each tile holds, as the processor reads it.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(FF_EMULATED)

inline thread_local Shapes shapes;
inline thread_local uint8_t memory[kCount][kRows][kRowBytes];

inline void configure(const Shapes& wanted) {
  shapes = wanted;
  std::memset(memory, 0, sizeof memory);
}
inline void release() { configure(Shapes{}); }

template <int TILE>
void clear() {
  std::memset(memory[TILE], 0, kBytes);
}

template <int TILE>
void load(const void* from, int64_t stride) {
  clear<TILE>();
  for (int row = 0; row < shapes.rows[TILE]; row++) {
    std::memcpy(memory[TILE][row], static_cast<const uint8_t*>(from) + row * stride, shapes.row_bytes[TILE]);
  }
}

template <int TILE>
void store(void* to, int64_t stride) {
  for (int row = 0; row < shapes.rows[TILE]; row++) {
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, memory[TILE][row], shapes.row_bytes[TILE]);
  }
}

template <int SUMS, int SIGNED, int UNSIGNED>
void add_products() {
  for (int row = 0; row < shapes.rows[SUMS]; row++) {
    int32_t sums[16];
    std::memcpy(sums, memory[SUMS][row], sizeof sums);
    for (int k = 0; k < shapes.row_bytes[SIGNED]; k++) {
      const int32_t value = static_cast<int8_t>(memory[SIGNED][row][k]);
      for (int lane = 0; lane < shapes.row_bytes[SUMS] / 4; lane++) {
        sums[lane] += value * memory[UNSIGNED][k / 4][4 * lane + k % 4];
      }
    }
    std::memcpy(memory[SUMS][row], sums, sizeof sums);
  }
}

#else

inline void configure(const Shapes& wanted) { asm volatile("ldtilecfg %0" ::"m"(wanted)); }
inline void release() { asm volatile("tilerelease"); }

template <int TILE>
inline void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
}

template <int TILE>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(to), "r"(stride) : "memory");
}

// Signed bytes (rows x 4 k) times unsigned bytes (k x lanes x 4), added to 32-bit sums (rows x lanes).
template <int SUMS, int SIGNED, int UNSIGNED>
inline void add_products() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(SIGNED), "i"(UNSIGNED));
}

#endif

}  // namespace tiles
}  // namespace fiftyfold
