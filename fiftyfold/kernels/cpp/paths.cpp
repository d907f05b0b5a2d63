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

struct Supported {
  const Path* paths[5] = {};

  Supported() {
    const Path** next = paths;
#if defined(FF_EMULATED)
    *next++ = &avx512::kPath;
    *next++ = &avxvnni::kPath;
    *next++ = &avx2::kPath;
#elif defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (avx2 && has_avx512_vnni()) *next++ = &avx512::kPath;
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
