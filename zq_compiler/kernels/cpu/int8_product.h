// A few rows of activations times a packed int8 matrix, summed exactly in int32.
//
// AVX512-VNNI multiplies unsigned by signed bytes, so 128 is added to activations and taken back from the sums. On AVX2
// vpmaddubsw would do the same, but it saturates sums of two products. There bytes are widened: weights as they are
// loaded, once for all rows of a tile, and activations ahead of time, for vpmaddwd. The arithmetic is otherwise the same.
#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "rows.h"

namespace zq {

#ifdef __AVX512VNNI__

constexpr int64_t kGroup = 4;    // values of k that one instruction sums into a lane
constexpr int64_t kVectors = 4;  // across a block of n; of 32 registers: 6 x 4 sums, 4 of w, 1 of x, 1 constant
using Unsigned = uint8_t;        // an activation, after 128 was added

using Weights = __m512i;  // a group for each lane
using Group = __m512i;    // one group for all lanes

inline Weights load_weights(const int8_t* w) { return _mm512_loadu_si512(w); }
inline Group broadcast(const uint8_t* x) {
  int32_t group;
  std::memcpy(&group, x, sizeof group);
  return _mm512_set1_epi32(group);
}
inline Group broadcast(const int8_t* x) {  // flipping the sign bit adds 128
  return _mm512_xor_si512(broadcast(reinterpret_cast<const uint8_t*>(x)), _mm512_set1_epi8(char(0x80)));
}
inline Ints dot(Ints sum, Group x, Weights w) { return _mm512_dpbusd_epi32(sum.v, x, w); }

inline void store(uint8_t* to, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes); }

// Numbers in [0, 255], of a block. The packs work in 128-bit lanes, hence the order.
inline void store(uint8_t* to, const Ints (&x)[kVectors]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(x[0].v, x[1].v), _mm512_packs_epi32(x[2].v, x[3].v));
  _mm512_store_si512(to, _mm512_permutexvar_epi32(order, packed));
}

#else

constexpr int64_t kGroup = 2;
constexpr int64_t kVectors = 1;  // of 16 registers: 6 x 2 sums, 2 of w, 1 of x
using Unsigned = uint16_t;

struct Weights {
  __m256i low, high;
};
using Group = __m256i;

inline Weights load_weights(const int8_t* w) {
  return {_mm256_cvtepi8_epi16(load_bytes(w)), _mm256_cvtepi8_epi16(load_bytes(w + 16))};
}
inline Group broadcast(const uint16_t* x) {
  int32_t group;
  std::memcpy(&group, x, sizeof group);
  return _mm256_set1_epi32(group);
}
inline Ints dot(Ints sum, Group x, Weights w) {
  return sum + Ints(_mm256_madd_epi16(w.low, x), _mm256_madd_epi16(w.high, x));
}

inline void store(uint16_t* to, __m128i bytes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvtepu8_epi16(bytes));
}
inline void store(uint16_t* to, const Ints (&x)[kVectors]) { store_low16(to, kAll, x[0]); }

#endif

constexpr int64_t kBlock = kVectors * kLanes;
constexpr int64_t kTileRows = 6;
constexpr int64_t kMaxSummed = (int64_t(1) << 31) / (255 * 128);  // more products may not fit an int32
constexpr int64_t kAhead = 16;  // rows to prefetch: heads lie side by side, so the rows of one are far apart

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// 16 values of x at a time, of which `count` are there, plus 128. Writes up to a multiple of 16.
inline void make_unsigned(const int8_t* x, int64_t count, Unsigned* to) {
  for_each_vector(count, [&](int64_t i, Lanes lanes) {
    store(to + i, _mm_xor_si128(load_bytes(x + i, lanes), _mm_set1_epi8(-128)));
  });
}

// Where a packed matrix w [n, k] has its values: blocks of kBlock of n (the last may be narrower), each
// [k/kGroup, width, kGroup].
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
// the registers. X is Unsigned, or what `broadcast` makes unsigned.
template <typename X, int Rows, int Vectors>
void multiply(const X* x, int64_t x_stride, const int8_t* w, int64_t w_step, int64_t groups, const int32_t* start,
              int32_t* sums, int64_t sums_stride) {
  Ints acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) {
    const Ints first = start ? load(start + v * kLanes) : Ints(0);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r][v] = first;
  }
  for (int64_t g = 0; g < groups; ++g) {
    Weights b[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) b[v] = load_weights(w + g * w_step + v * kLanes * kGroup);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Group a = broadcast(x + r * x_stride + g * kGroup);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) acc[r][v] = dot(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(sums + r * sums_stride + v * kLanes, acc[r][v]);
}

template <typename X>
using Multiply = void (*)(const X*, int64_t, const int8_t*, int64_t, int64_t, const int32_t*, int32_t*, int64_t);
template <typename X, int Vectors>
constexpr std::array<Multiply<X>, kTileRows> kHeights{multiply<X, 1, Vectors>, multiply<X, 2, Vectors>,
                                                      multiply<X, 3, Vectors>, multiply<X, 4, Vectors>,
                                                      multiply<X, 5, Vectors>, multiply<X, 6, Vectors>};
template <int... V>
constexpr auto widths(std::integer_sequence<int, V...>) {
  return std::array{kHeights<Unsigned, V + 1>.data()...};  // a copy of such an array GCC 12 reads wrongly
}
constexpr auto kWidths = widths(std::make_integer_sequence<int, kVectors>());

// The same for up to kTileRows rows of x and the first n of w, over the first groups of k.
inline void multiply_rows(int64_t rows, const Unsigned* x, int64_t x_stride, Layout layout, const int8_t* w, int64_t n,
                          int64_t groups, const int32_t* start, int32_t* sums, int64_t sums_stride) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t vectors = ceil_div(std::min(kBlock, n - i), kLanes);
    kWidths[vectors - 1][rows - 1](x, x_stride, w + layout.offset(i, 0), layout.width(i) * kGroup, groups,
                                   start ? start + i : nullptr, sums + i, sums_stride);
  }
}

// Four rows from i on of x [rows, columns], 16 columns from c on; zeros outside.
struct FourRows {
  __m128i row[4];

  FourRows(const int8_t* x, int64_t stride, int64_t rows, int64_t columns, int64_t i, int64_t c) {
    for (int j = 0; j < 4; ++j) __builtin_prefetch(x + (i + j + kAhead) * stride + c);
    for (int j = 0; j < 4; ++j)
      row[j] = load_bytes(x + (i + j) * stride + c, first_lanes(i + j < rows ? columns - c : 0));
  }
};

// Packs w = x [n, k], four rows and 16 columns at a time; start[i] = -128 * sum over k of w[i][k] takes back the 128
// that makes the other operand unsigned.
inline void pack_rows(const int8_t* x, int64_t stride, int64_t n, int64_t k, Layout layout, int8_t* w, int32_t* start) {
  constexpr int64_t kGroups = 16 / kGroup, kBytes = 4 * kGroup;  // of a group of four rows
  for (int64_t i = 0; i < layout.n; i += 4)
    for (int64_t g = 0; g < layout.groups; g += kGroups) {
      const auto [a, b, c, d] = FourRows(x, stride, n, k, i, g * kGroup).row;
      alignas(16) int8_t groups[kGroups][kBytes];
      auto* to = reinterpret_cast<__m128i*>(groups);
      if constexpr (kGroup == 4) {
        const __m128i low_ab = _mm_unpacklo_epi32(a, b), high_ab = _mm_unpackhi_epi32(a, b);
        const __m128i low_cd = _mm_unpacklo_epi32(c, d), high_cd = _mm_unpackhi_epi32(c, d);
        to[0] = _mm_unpacklo_epi64(low_ab, low_cd), to[1] = _mm_unpackhi_epi64(low_ab, low_cd);
        to[2] = _mm_unpacklo_epi64(high_ab, high_cd), to[3] = _mm_unpackhi_epi64(high_ab, high_cd);
      } else {
        const __m128i low_ab = _mm_unpacklo_epi16(a, b), high_ab = _mm_unpackhi_epi16(a, b);
        const __m128i low_cd = _mm_unpacklo_epi16(c, d), high_cd = _mm_unpackhi_epi16(c, d);
        to[0] = _mm_unpacklo_epi32(low_ab, low_cd), to[1] = _mm_unpackhi_epi32(low_ab, low_cd);
        to[2] = _mm_unpacklo_epi32(high_ab, high_cd), to[3] = _mm_unpackhi_epi32(high_ab, high_cd);
      }
      for (int64_t j = 0; j < kGroups && g + j < layout.groups; ++j)
        std::memcpy(w + layout.offset(i, g + j), groups[j], kBytes);
    }
  Unsigned ones[kGroup];
  std::fill_n(ones, kGroup, Unsigned(1));
  for (int64_t i = 0; i < layout.n; i += kLanes) {
    Ints sum = 0;
    for (int64_t g = 0; g < layout.groups; ++g) sum = dot(sum, broadcast(ones), load_weights(w + layout.offset(i, g)));
    store(start + i, Ints(0) - (sum << 7));
  }
}

// Packs w, the transpose of x [k, n]: four rows and 16 columns at a time.
inline void pack_columns(const int8_t* x, int64_t stride, int64_t k, int64_t n, Layout layout, int8_t* w) {
  constexpr int64_t kGroups = 4 / kGroup;
  for (int64_t g = 0; g < layout.groups; g += kGroups)
    for (int64_t i = 0; i < layout.n; i += kLanes) {
      const auto [a, b, c, d] = FourRows(x, stride, k, n, g * kGroup, i).row;
      const __m128i low_ab = _mm_unpacklo_epi8(a, b), high_ab = _mm_unpackhi_epi8(a, b);
      const __m128i low_cd = _mm_unpacklo_epi8(c, d), high_cd = _mm_unpackhi_epi8(c, d);
      const auto put = [&](int64_t group, auto... part) {
        auto* to = reinterpret_cast<__m128i*>(w + layout.offset(i, group));
        (_mm_storeu_si128(to++, part), ...);
      };
      if constexpr (kGroup == 4) {
        put(g, _mm_unpacklo_epi16(low_ab, low_cd), _mm_unpackhi_epi16(low_ab, low_cd),
            _mm_unpacklo_epi16(high_ab, high_cd), _mm_unpackhi_epi16(high_ab, high_cd));
      } else {
        put(g, low_ab, high_ab);
        if (g + 1 < layout.groups) put(g + 1, low_cd, high_cd);
      }
    }
}

}  // namespace zq
