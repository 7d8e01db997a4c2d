// A few rows of unsigned bytes times a packed int8 matrix, summed in int32 by vpdpbusd.
#pragma once

#include <array>
#include <cstring>

#include "rows.h"

namespace zq {

constexpr int64_t kGroup = 4;                  // values that vpdpbusd sums into one lane
constexpr int64_t kVectors = 4;                // registers across a block of n
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int64_t kTileRows = 6;               // of 32 registers: 6 x 4 sums, 4 of w, 1 of x
constexpr int64_t kMaxSummed = (int64_t(1) << 31) / (255 * 128);  // more products may not fit an int32
constexpr int64_t kAhead = 16;  // rows to prefetch: heads lie side by side, so the rows of one are far apart

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Where a packed matrix w [n, k] has its values: in blocks of 64 of n (the last may be narrower), each [k/4, width, 4].
struct Layout {
  int64_t n, groups;

  Layout(int64_t n, int64_t k) : n(round_up(n, kLanes)), groups(ceil_div(k, kGroup)) {}
  int64_t bytes() const { return n * groups * kGroup; }
  int64_t width(int64_t i) const { return std::min(kBlock, n - i / kBlock * kBlock); }
  int64_t offset(int64_t i, int64_t group) const {
    const int64_t block = i / kBlock * kBlock;
    return (block * groups + group * width(i) + i - block) * kGroup;
  }
};

// sums[r][i] = start[i] + sum over k of x[r][k] * w[i][k]. Without the pragmas GCC unrolls too late and `acc` leaves
// the registers.
template <int Rows, int Vectors>
void multiply(const uint8_t* x, int64_t x_stride, const int8_t* w, int64_t w_step, int64_t groups, const int32_t* start,
              int32_t* sums, int64_t sums_stride) {
  __m512i acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) {
    const __m512i first = start ? _mm512_load_si512(start + v * kLanes) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r][v] = first;
  }
  for (int64_t g = 0; g < groups; ++g) {
    __m512i b[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) b[v] = _mm512_load_si512(w + g * w_step + v * 64);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int32_t group;
      std::memcpy(&group, x + r * x_stride + g * kGroup, kGroup);
      const __m512i a = _mm512_set1_epi32(group);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) _mm512_store_si512(sums + r * sums_stride + v * kLanes, acc[r][v]);
}

using Multiply = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int64_t, const int32_t*, int32_t*, int64_t);
template <int Rows>
constexpr std::array<Multiply, kVectors> kWidths{multiply<Rows, 1>, multiply<Rows, 2>, multiply<Rows, 3>,
                                                 multiply<Rows, 4>};
constexpr std::array<Multiply, kVectors> kMultiply[]{kWidths<1>, kWidths<2>, kWidths<3>,
                                                     kWidths<4>, kWidths<5>, kWidths<6>};

// The same for up to kTileRows rows of x and the first n of w, over the first groups of k.
inline void multiply_rows(int64_t rows, const uint8_t* x, int64_t x_stride, Layout layout, const int8_t* w, int64_t n,
                          int64_t groups, const int32_t* start, int32_t* sums, int64_t sums_stride) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t vectors = ceil_div(std::min(kBlock, n - i), kLanes);
    kMultiply[rows - 1][vectors - 1](x, x_stride, w + layout.offset(i, 0), layout.width(i) * kGroup, groups,
                                     start ? start + i : nullptr, sums + i, sums_stride);
  }
}

// Four rows from i on of x [rows, columns], 16 columns from c on; zeros outside.
struct FourRows {
  __m128i row[4];

  FourRows(const int8_t* x, int64_t stride, int64_t rows, int64_t columns, int64_t i, int64_t c) {
    const __mmask16 lanes = lane_mask(columns - c);
    for (int j = 0; j < 4; ++j) __builtin_prefetch(x + (i + j + kAhead) * stride + c);
    for (int j = 0; j < 4; ++j)
      row[j] = _mm_maskz_loadu_epi8(i + j < rows ? lanes : __mmask16(0), x + (i + j) * stride + c);
  }
};

// Packs w = x [n, k], four rows and four groups of them at a time; start[i] = -128 * sum over k of w[i][k] takes back
// the 128 that makes the other operand unsigned.
inline void pack_rows(const int8_t* x, int64_t stride, int64_t n, int64_t k, Layout layout, int8_t* w, int32_t* start) {
  for (int64_t i = 0; i < layout.n; i += 4)
    for (int64_t g = 0; g < layout.groups; g += 4) {
      const auto [a, b, c, d] = FourRows(x, stride, n, k, i, g * kGroup).row;
      const __m128i low_ab = _mm_unpacklo_epi32(a, b), high_ab = _mm_unpackhi_epi32(a, b);
      const __m128i low_cd = _mm_unpacklo_epi32(c, d), high_cd = _mm_unpackhi_epi32(c, d);
      const __m128i group[] = {_mm_unpacklo_epi64(low_ab, low_cd), _mm_unpackhi_epi64(low_ab, low_cd),
                               _mm_unpacklo_epi64(high_ab, high_cd), _mm_unpackhi_epi64(high_ab, high_cd)};
      for (int j = 0; j < 4 && g + j < layout.groups; ++j)
        _mm_store_si128(reinterpret_cast<__m128i*>(w + layout.offset(i, g + j)), group[j]);
    }
  for (int64_t i = 0; i < layout.n; i += kLanes) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t g = 0; g < layout.groups; ++g)
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_load_si512(w + layout.offset(i, g)));
    _mm512_store_si512(start + i, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128)));
  }
}

// Packs w, the transpose of x [k, n]: one group of 16 columns at a time.
inline void pack_columns(const int8_t* x, int64_t stride, int64_t k, int64_t n, Layout layout, int8_t* w) {
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t i = 0; i < layout.n; i += kLanes) {
      const auto [a, b, c, d] = FourRows(x, stride, k, n, g * kGroup, i).row;
      const __m128i low_ab = _mm_unpacklo_epi8(a, b), high_ab = _mm_unpackhi_epi8(a, b);
      const __m128i low_cd = _mm_unpacklo_epi8(c, d), high_cd = _mm_unpackhi_epi8(c, d);
      auto* to = reinterpret_cast<__m128i*>(w + layout.offset(i, g));
      _mm_store_si128(to, _mm_unpacklo_epi16(low_ab, low_cd));
      _mm_store_si128(to + 1, _mm_unpackhi_epi16(low_ab, low_cd));
      _mm_store_si128(to + 2, _mm_unpacklo_epi16(high_ab, high_cd));
      _mm_store_si128(to + 3, _mm_unpackhi_epi16(high_ab, high_cd));
    }
}

}  // namespace zq
