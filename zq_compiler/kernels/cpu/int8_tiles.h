// 32 rows of activations times 32 columns of a packed int8 matrix, summed exactly in int32 by AMX.
//
// What is packed for AVX512-VNNI is what AMX reads: a tile of weights is sixteen lines of it, each of sixteen outputs by
// kGroup values of k. Both operands are signed, so nothing is added to activations and nothing taken back.
#pragma once

#include "int8_product.h"

#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace zq {

constexpr int64_t kTileLines = 16;  // of a tile, 64 bytes each
constexpr int64_t kTileDepth = 64;  // values of k that one instruction sums
constexpr int64_t kStripRows = 2 * kTileLines;
constexpr int64_t kStripColumns = 2 * kLanes;

#ifdef __AMX_INT8__

// Linux gives a process its tiles when asked for them, and may refuse.
inline bool have_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

// GCC does not know what memory these instructions read.
inline void finish_stores() {
  asm volatile("" ::: "memory");
}

// This thread has tiles of full size while it lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    finish_stores();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// sums[r][i] = sum over k of x[r][k] * w[i][k] of kStripRows rows and kStripColumns columns, `steps` tiles deep; `rest`,
// where there is one, is the last tile's lines of w. At each step `lines` of 64 bytes are fetched from `next` on, which is
// multiplied soon.
inline void multiply_strip(const int8_t* x, int64_t x_stride, const int8_t* w, const int8_t* rest, int64_t steps,
                           const int8_t* next, int64_t lines, int32_t* sums) {
  constexpr int64_t kLine = kBlock * kGroup, kWide = kLanes * kGroup;
  const int8_t* lower = x + kTileLines * x_stride;
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    const int8_t* from = rest && s == steps - 1 ? rest : w + s * kTileLines * kLine;
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(next + (s * lines + i) * 64, 0, 2);
    _tile_loadd(4, x + s * kTileDepth, x_stride);
    _tile_loadd(6, from, kLine);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, from + kWide, kLine);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, lower + s * kTileDepth, x_stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  constexpr int64_t kSums = kBlock * sizeof(int32_t);
  int32_t* lower_sums = sums + kTileLines * kBlock;
  _tile_stored(0, sums, kSums);
  _tile_stored(1, sums + kLanes, kSums);
  _tile_stored(2, lower_sums, kSums);
  _tile_stored(3, lower_sums + kLanes, kSums);
}

#else

inline bool have_tiles() {
  return false;
}
struct Tiles {};
inline void multiply_strip(const void*, int64_t, const int8_t*, const int8_t*, int64_t, const int8_t*, int64_t,
                           int32_t*) {}

#endif

}  // namespace zq
