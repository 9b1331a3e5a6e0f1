// Attention in pairs of bfloat16, which one instruction multiplies and adds, in tiles or in vectors: bfloat16 queries, and keys
// and values in bfloat16 or int8 (whose integers are exact in bfloat16; their scales go to the products and to the weights).
// Weights are rounded to bfloat16 before the values. Here is what both have in common.
#pragma once

#if defined(__AVX512F__)

#include "attention.h"
#include "byte_numbers.h"
#include "repeat.h"

namespace skyline::attention {

// The first n of the 64 bytes that lie there; the others are zero.
inline __m512i load_bytes(const void* from, int64_t n) {
  return n >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, from);
}

// Of a matrix of 16 x 16 units of 32 bits.
inline void transpose_pairs(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  }
}

inline __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// The softmax numerators of a row of scores, as bfloat16 and times their keys' v_scale, at the beginning of the row: zeros if it
// sees nothing of the split.
template <bool scaled>
inline RowSum weigh_row(float* s, Span mine, Span all, const Scoring& scoring, const float* k_scale, const float* v_scale) {
  bf16* to = reinterpret_cast<bf16*>(s);
  if (mine.empty()) {
    std::memset(to, 0, kSplit * sizeof(bf16));
    return {0, 0};
  }
  return softmax(s, mine, all, scoring, scaled ? k_scale : nullptr, [&](int key, const Vec* weights) {
    __m512 low = weights[0].v, high = weights[1].v;
    if constexpr (scaled) {
      low = _mm512_mul_ps(low, _mm512_load_ps(v_scale + key));
      high = _mm512_mul_ps(high, _mm512_load_ps(v_scale + key + 16));
    }
    _mm512_storeu_si512(to + key, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  });
}

// What keys and values become, by the type they are kept in.
template <class KV>
struct Pairs;

template <>
struct Pairs<bf16> {
  static constexpr int kDims = 32;  // in 64 bytes
  static constexpr int kVectors = kDims / 32;
  // 64 bytes of a key as they are multiplied; n dimensions are there.
  void line(const bf16* from, int64_t n, __m512i (&to)[kVectors]) const { to[0] = load_bytes(from, 2 * n); }
  // Which pair of dimensions is in a lane of the v-th of a key's vectors.
  static constexpr int64_t pair(int64_t v, int lane) { return 16 * v + lane; }
  // use(i, keys) for the i-th pair of a vector's dimensions, of 16 keys. rows: after transpose_pairs.
  template <class Use>
  __attribute__((always_inline)) void keys(const __m512i (&rows)[16], const Use& use) const {
    repeat<16>(SKYLINE_EACH(i) { use(i, rows[i]); });
  }
  // Two keys' values of 32 dimensions, n of which are there: those that `low` and `high` are for are told below.
  void values(const bf16* even, const bf16* odd, int64_t n, __m512i& low, __m512i& high) const {
    const __m512i a = load_bytes(even, 2 * n), b = load_bytes(odd, 2 * n);
    low = _mm512_unpacklo_epi16(a, b);
    high = _mm512_unpackhi_epi16(a, b);
  }
};

template <>
struct Pairs<int8_t> {
  static constexpr int kDims = 64;
  static constexpr int kVectors = kDims / 32;
  void line(const int8_t* from, int64_t n, __m512i (&to)[kVectors]) const { numbers_.widen(load_bytes(from, n), to[0], to[1]); }
  static constexpr int64_t pair(int64_t v, int lane) { return v / 2 * 32 + (lane / 4 * 2 + v % 2) * 4 + lane % 4; }
  template <class Use>
  __attribute__((always_inline)) void keys(const __m512i (&rows)[16], const Use& use) const {
    const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    repeat<16>(SKYLINE_EACH(i) {
      __m512i first, second;
      numbers_.widen(_mm512_shuffle_epi8(rows[i], halves), first, second);
      use(std::integral_constant<int, 2 * i>(), first);
      use(std::integral_constant<int, 2 * i + 1>(), second);
    });
  }
  void values(const int8_t* even, const int8_t* odd, int64_t n, __m512i& low, __m512i& high) const {
    const __m256i a = load(even, n), b = load(odd, n);
    const __m512i wide = _mm512_or_si512(_mm512_cvtepu8_epi16(a), _mm512_slli_epi16(_mm512_cvtepu8_epi16(b), 8));
    numbers_.widen(wide, low, high);
  }

 private:
  static __m256i load(const int8_t* from, int64_t n) {
    return n >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_maskz_loadu_epi8((1u << n) - 1, from);
  }
  const ByteNumbers<Int8> numbers_;
};

// 16 keys as [pairs of dimensions][16 keys], padded to a multiple of 32 dimensions.
template <class KV>
inline void pack_key_rows(const KV* const (&rows)[16], int64_t dim, bf16* to) {
  constexpr int dims = Pairs<KV>::kDims;
  const Pairs<KV> pairs{};
  for (int64_t d = 0; d < dim; d += dims, to += 16 * dims) {
    const int64_t wanted = round_up(std::min<int64_t>(dim - d, dims), 32) / 2;
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = load_bytes(rows[i] + d, (dim - d) * static_cast<int64_t>(sizeof(KV)));
    transpose_pairs(r);
    pairs.keys(r, [&](auto i, __m512i keys) __attribute__((always_inline)) {
      if (i < wanted) _mm512_store_si512(to + 32 * i, keys);
    });
  }
}

// Two keys' values, as one line of each of the blocks [16 pairs of keys][16 dimensions].
template <class KV>
inline void pack_value_pair(const KV* even, const KV* odd, int64_t dim, bf16* to) {
  const Pairs<KV> pairs{};
  for (int64_t d = 0; d < dim; d += 32, to += 1024) {
    __m512i low, high;
    pairs.values(even + d, odd + d, dim - d, low, high);
    _mm512_store_si512(to, low);
    _mm512_store_si512(to + 512, high);
  }
}

// Packing leaves the dimensions of 32 in the order 0-3 8-11 16-19 24-27, 4-7 12-15 20-23 28-31: results, times factor,
// go back into theirs.
inline void store_unpacked(bf16* to, const float* values, float factor, int64_t dim) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < dim; i += 32) {
    __m512 a = _mm512_loadu_ps(values + i), b = _mm512_loadu_ps(values + i + 16), by = _mm512_set1_ps(factor);
    // Adding zero makes negative zeros positive, whose sign would depend on what was skipped.
    Vec first{_mm512_fmadd_ps(_mm512_permutex2var_ps(a, low, b), by, _mm512_setzero_ps())};
    Vec second{_mm512_fmadd_ps(_mm512_permutex2var_ps(a, high, b), by, _mm512_setzero_ps())};
    if (int left = static_cast<int>(dim - i); left >= 32) {
      first.store(to + i);
      second.store(to + i + 16);
    } else {
      first.store(to + i, left);
      if (left > 16) second.store(to + i + 16, left - 16);
    }
  }
}

}  // namespace skyline::attention

#endif
