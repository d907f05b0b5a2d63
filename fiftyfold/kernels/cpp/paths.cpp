#include "paths.h"

#include <atomic>
#include <cstring>

#include "path_portable.h"
#if defined(__x86_64__) || defined(FF_EMULATED)
#define FF_PATH avx2
#define FF_VNNI 0
#include "path_256.h"
#undef FF_PATH
#undef FF_VNNI
#define FF_PATH avxvnni
#define FF_VNNI 1
#include "path_256.h"
#undef FF_PATH
#undef FF_VNNI
#include "path_avx512.h"
// Compilers that have headers for AMX come with assemblers that know it.
#if defined(FF_EMULATED) || (defined(__linux__) && (__has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>)))
#define FF_TILES 1
#include "path_amx.h"
#if !defined(FF_EMULATED)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#elif defined(__aarch64__)
#define FF_PATH neon
#define FF_DOT 0
#include "path_neon.h"
#undef FF_PATH
#undef FF_DOT
#define FF_PATH neondot
#define FF_DOT 1
#include "path_neon.h"
#undef FF_PATH
#undef FF_DOT
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace fiftyfold {
namespace {

#if defined(__aarch64__) && !defined(FF_EMULATED)
bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  int present = 0;
  size_t size = sizeof present;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &present, &size, nullptr, 0) == 0 && present;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__) && !defined(FF_EMULATED)
bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(FF_TILES) && !defined(FF_EMULATED)
// A process must ask the kernel for the tiles' memory before it uses them.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBytes) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Supported {
  const Path* paths[6] = {};

  Supported() {
    const Path** next = paths;
#if defined(FF_EMULATED)
    *next++ = &amx::kPath;
    *next++ = &avx512::kPath;
    *next++ = &avxvnni::kPath;
    *next++ = &avx2::kPath;
#elif defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && has_avx512_vnni();
#if defined(FF_TILES)
    if (avx512 && has_amx()) *next++ = &amx::kPath;
#endif
    if (avx512) *next++ = &avx512::kPath;
    if (avx2 && __builtin_cpu_supports("avxvnni")) *next++ = &avxvnni::kPath;
    if (avx2) *next++ = &avx2::kPath;
#elif defined(__aarch64__)
    if (has_dot_product()) *next++ = &neondot::kPath;
    *next++ = &neon::kPath;
#endif
    *next++ = &portable::kPath;
  }
};

std::atomic<const Path*> chosen{nullptr};

}  // namespace

const Path* const* supported_paths() {
  static const Supported supported;
  return supported.paths;
}

const Path& current_path() {
  const Path* path = chosen.load(std::memory_order_relaxed);
  return path ? *path : *supported_paths()[0];
}

bool choose_path(const char* name) {
  for (const Path* const* path = supported_paths(); *path; path++) {
    if (!std::strcmp((*path)->name, name)) {
      chosen = *path;
      return true;
    }
  }
  return false;
}

}  // namespace fiftyfold
