// The inner kernels of all matrix products: rows of A times one panel of 32 packed columns, accumulated in float32 or int32.
//
// Each output element is one chain of additions along K, in order, whatever the number of rows: that is what makes results
// independent of the batch. The three instruction sets order the additions inside a step of K differently, so their
// results may differ from each other.
#pragma once

#include <cstring>

#include "amx.h"
#include "packed.h"
#include "simd.h"

namespace skyline {

// How far ahead weights are asked for from memory. The hardware's own prefetching stops while a block is being widened or
// multiplied by many rows; asking ahead keeps memory busy meanwhile. Panels lie one after the other, so running over the end
// of one is right, and asking for memory that is not there does nothing.
constexpr int64_t kAhead = 8192;

template <int lines>
inline void prefetch(const uint8_t* from) {
#pragma GCC unroll 32
  for (int i = 0; i < lines; i++) prefetch_l2(from + kAhead + 64 * i);
}

#if defined(__AMX_TILE__)

constexpr int64_t kRowBlock = 32;

// Tiles 0-3 accumulate (rows 0-15 and 16-31, by columns 0-15 and 16-31), 4 and 5 are rows of A, 6 and 7 columns of B.
class TileShape {
 public:
  // depth: bytes of A's rows, 4 for each row of B.
  void set(int64_t rows, int64_t depth) {
    if (rows == rows_ && depth == depth_) return;
    rows_ = rows;
    depth_ = depth;
    TileConfig config;
    const int64_t first = std::min<int64_t>(rows, 16), second = rows > 16 ? rows - 16 : 1;
    const int64_t heights[8] = {first, first, second, second, first, second, depth / 4, depth / 4};
    for (int i = 0; i < 8; i++) config.set(i, heights[i], i == 4 || i == 5 ? depth : 64);
    config.load();
  }

 private:
  int64_t rows_ = 0, depth_ = 0;
};

struct Bf16Step {
  using A = bf16;
  using C = float;
  static constexpr int64_t k = 32;
};
struct Int8Step {
  using A = int8_t;
  using C = int32_t;
  static constexpr int64_t k = 64;
};
struct Int8HalfStep {
  using A = int8_t;
  using C = int32_t;
  static constexpr int64_t k = 32;
};

// c [rows][32] (+)= a [rows, steps * k] (row stride lda) times the panel's blocks at b.
template <class Step>
void multiply(TileShape& shape, const typename Step::A* a, int64_t lda, int64_t rows, const uint8_t* b, int64_t steps,
              typename Step::C* c, bool accumulate, bool stream = false) {
  constexpr bool integer = sizeof(typename Step::A) == 1;
  constexpr int64_t depth = Step::k * static_cast<int64_t>(sizeof(*a)), tile = depth * kTile;  // in bytes
  const int64_t stride = lda * static_cast<int64_t>(sizeof(*a));
  tile_fence();
  shape.set(rows, depth);
  if (rows <= 16) {
    if (accumulate) {
      _tile_loadd(0, c, 128);
      _tile_loadd(1, c + 16, 128);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (int64_t s = 0; s < steps; s++, a += Step::k, b += 2 * tile) {
      if (stream) prefetch<32>(b);
      _tile_loadd(4, a, stride);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + tile, 64);
      if constexpr (integer) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    return;
  }
  const typename Step::A* a2 = a + 16 * lda;
  typename Step::C* c2 = c + 16 * kPanel;
  if (accumulate) {
    _tile_loadd(0, c, 128);
    _tile_loadd(1, c + 16, 128);
    _tile_loadd(2, c2, 128);
    _tile_loadd(3, c2 + 16, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s++, a += Step::k, a2 += Step::k, b += 2 * tile) {
    if (stream) prefetch<32>(b);
    _tile_loadd(4, a, stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + tile, 64);
    _tile_loadd(5, a2, stride);
    if constexpr (integer) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c2, 128);
  _tile_stored(3, c2 + 16, 128);
}

#elif defined(__AVX512F__)

constexpr int64_t kRowBlock = 12;  // 24 accumulators, 2 columns, 1 row, of 32 registers

struct TileShape {};

struct Bf16Step {
  using A = bf16;
  using C = float;
  static constexpr int64_t k = 32;
  using V = __m512;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* c) { return _mm512_loadu_ps(c); }
  static void store(float* c, V v) { _mm512_storeu_ps(c, v); }
  static __m512i spread(const bf16* a) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    return _mm512_set1_epi32(pair);
  }
  static V dot(V acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
};

// VPDPBUSD takes an unsigned by a signed factor, so A is shifted by 128; the caller takes 128 * sum(b) off again.
struct Int8Step {
  using A = int8_t;
  using C = int32_t;
  static constexpr int64_t k = 64;
  using V = __m512i;
  static V zero() { return _mm512_setzero_si512(); }
  static V load(const int32_t* c) { return _mm512_loadu_si512(c); }
  static void store(int32_t* c, V v) { _mm512_storeu_si512(c, v); }
  static __m512i spread(const int8_t* a) {
    uint32_t four;
    std::memcpy(&four, a, 4);
    return _mm512_set1_epi32(static_cast<int32_t>(four ^ 0x80808080u));
  }
  static V dot(V acc, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(acc, a, b); }
};

template <class Step, int R>
void multiply_rows(const typename Step::A* a, int64_t lda, const uint8_t* b, int64_t steps, typename Step::C* c,
                   bool accumulate) {
  typename Step::V acc[R][2];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < 2; t++) acc[r][t] = accumulate ? Step::load(c + r * kPanel + 16 * t) : Step::zero();
  constexpr int64_t a_part = Step::k / 16;
  for (int64_t s = 0; s < steps; s++, a += Step::k, b += 2048)
    for (int p = 0; p < 16; p++) {
      __m512i left = _mm512_loadu_si512(b + 64 * p), right = _mm512_loadu_si512(b + 1024 + 64 * p);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        __m512i x = Step::spread(a + r * lda + p * a_part);
        acc[r][0] = Step::dot(acc[r][0], x, left);
        acc[r][1] = Step::dot(acc[r][1], x, right);
      }
    }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < 2; t++) Step::store(c + r * kPanel + 16 * t, acc[r][t]);
}

#else  // AVX2

constexpr int64_t kRowBlock = 4;

struct TileShape {};

// Both steps work on 8 columns at a time: half of a tile's width, so four passes over a panel's registers.
struct Bf16Step {
  using A = bf16;
  using C = float;
  static constexpr int64_t k = 32;
  using V = __m256;
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* c) { return _mm256_loadu_ps(c); }
  static void store(float* c, V v) { _mm256_storeu_ps(c, v); }
  static V dot(V acc, const bf16* a, __m256i b) {
    __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(b, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
    acc = _mm256_fmadd_ps(_mm256_set1_ps(to_float(a[0])), even, acc);
    return _mm256_fmadd_ps(_mm256_set1_ps(to_float(a[1])), odd, acc);
  }
};

struct Int8Step {
  using A = int8_t;
  using C = int32_t;
  static constexpr int64_t k = 64;
  using V = __m256i;
  static V zero() { return _mm256_setzero_si256(); }
  static V load(const int32_t* c) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c)); }
  static void store(int32_t* c, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), v); }
  // VPMADDUBSW takes an unsigned by a signed factor: |a| by b with a's sign. 2 * 127 * 127 fits its 16 bits.
  static V dot(V acc, const int8_t* a, __m256i b) {
    int32_t four;
    std::memcpy(&four, a, 4);
    __m256i x = _mm256_set1_epi32(four);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(b, x));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

template <class Step, int R>
void multiply_rows(const typename Step::A* a, int64_t lda, const uint8_t* b, int64_t steps, typename Step::C* c,
                   bool accumulate) {
  constexpr int64_t a_part = Step::k / 16;
  for (int tile = 0; tile < 2; tile++) {
    typename Step::V acc[R][2];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < 2; t++)
        acc[r][t] = accumulate ? Step::load(c + r * kPanel + 16 * tile + 8 * t) : Step::zero();
    for (int64_t s = 0; s < steps; s++)
      for (int p = 0; p < 16; p++) {
        const __m256i* at = reinterpret_cast<const __m256i*>(b + s * 2048 + tile * 1024 + 64 * p);
        __m256i left = _mm256_loadu_si256(at), right = _mm256_loadu_si256(at + 1);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const typename Step::A* x = a + r * lda + s * Step::k + p * a_part;
          acc[r][0] = Step::dot(acc[r][0], x, left);
          acc[r][1] = Step::dot(acc[r][1], x, right);
        }
      }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < 2; t++) Step::store(c + r * kPanel + 16 * tile + 8 * t, acc[r][t]);
  }
}

#endif

#if !defined(__AMX_TILE__)

template <class Step, int R = static_cast<int>(kRowBlock)>
void multiply(TileShape& shape, const typename Step::A* a, int64_t lda, int64_t rows, const uint8_t* b, int64_t steps,
              typename Step::C* c, bool accumulate, bool stream = false) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<Step, R - 1>(shape, a, lda, rows, b, steps, c, accumulate);
  }
  multiply_rows<Step, R>(a, lda, b, steps, c, accumulate);
}

#endif

// float32: the panel is [k][32].
template <int R = 4>
void multiply_float(const float* a, int64_t lda, int64_t rows, const float* b, int64_t k, float* c, bool accumulate) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_float<R - 1>(a, lda, rows, b, k, c, accumulate);
  }
  constexpr int parts = 16 / Vec::width;
  for (int tile = 0; tile < 2; tile++) {
    Vec acc[R][parts];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < parts; t++)
        acc[r][t] = accumulate ? Vec::load(c + r * kPanel + 16 * tile + t * Vec::width) : Vec::zero();
    for (int64_t i = 0; i < k; i++) {
      Vec columns[parts];
      for (int t = 0; t < parts; t++) columns[t] = Vec::load(b + i * kPanel + 16 * tile + t * Vec::width);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        Vec x = Vec::all(a[r * lda + i]);
        for (int t = 0; t < parts; t++) acc[r][t] = fma(x, columns[t], acc[r][t]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < parts; t++) acc[r][t].store(c + r * kPanel + 16 * tile + t * Vec::width);
  }
}

// Widens `blocks` blocks of 32 k of an int8 weight-only panel to the bfloat16 layout. Integers up to 256 are exact in it.
inline void widen_int8(const uint8_t* from, int64_t blocks, uint8_t* to) {
  for (int64_t i = 0; i < blocks * 32; i++, from += 32, to += 64) {
    if (i % 2 == 0) prefetch<1>(from);
#if defined(__AVX512F__)
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16))));
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
    for (int part = 0; part < 4; part++) {
      __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * part)));
      Vec{_mm256_cvtepi32_ps(wide)}.store(reinterpret_cast<bf16*>(to) + 8 * part);
    }
#endif
  }
}

// int4 levels 0 to 15 times rows of A, for the `blocks` blocks of 32 k of one group: c [R][32] = a [R, 32 * blocks] times the
// levels at b. Unlike signed ones, levels go into the instructions as they are; the caller takes 8 * sum(a) off again.
template <int R>
void multiply_levels(const int8_t* a, int64_t lda, const uint8_t* b, int64_t blocks, int32_t* c) {
  auto four = [](const int8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return bytes;
  };
#if defined(__AVX512F__)
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i acc[R][4];  // by tile and nibble
  for (auto& row : acc)
    for (__m512i& vec : row) vec = _mm512_setzero_si512();
  for (int64_t block = 0; block < blocks; block++, a += 32, b += 512)
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++) {
      prefetch_l2(b + kAhead + 64 * part);
      const __m512i bytes = _mm512_loadu_si512(b + 64 * part);
      const __m512i low = _mm512_and_si512(bytes, nibble), high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
      const int t = part / 4 * 2;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const int8_t* x = a + r * lda + part % 4 * 4;
        acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], low, _mm512_set1_epi32(four(x)));
        acc[r][t + 1] = _mm512_dpbusd_epi32(acc[r][t + 1], high, _mm512_set1_epi32(four(x + 16)));
      }
    }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < 2; t++)
      _mm512_storeu_si512(c + r * kPanel + 16 * t, _mm512_add_epi32(acc[r][2 * t], acc[r][2 * t + 1]));
#else
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int eight = 0; eight < 4; eight++) {  // of the panel's columns
    __m256i acc[R];
    for (__m256i& vec : acc) vec = _mm256_setzero_si256();
    for (int64_t block = 0; block < blocks; block++)
      for (int part = 0; part < 4; part++) {
        const uint8_t* at = b + block * 512 + eight / 2 * 256 + part * 64 + eight % 2 * 32;
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        const __m256i low = _mm256_and_si256(bytes, nibble), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        for (int r = 0; r < R; r++) {
          const int8_t* x = a + r * lda + block * 32 + part * 4;
          const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, _mm256_set1_epi32(four(x))),
                                                 _mm256_maddubs_epi16(high, _mm256_set1_epi32(four(x + 16))));
          acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(pairs, ones));
        }
      }
    for (int r = 0; r < R; r++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * kPanel + 8 * eight), acc[r]);
  }
#endif
}

#if defined(__AMX_TILE__)

// Widens int4 blocks of 32 k to int8 tiles, -8 to 7, for steps of 32 or 64 k.
inline void widen_int4(const uint8_t* from, int64_t blocks, int64_t step_k, uint8_t* to) {
  const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  const int64_t tile = step_k * kTile;
  for (int64_t block = 0; block < blocks; block++) {
    uint8_t* at = to + block * 32 / step_k * 2 * tile + block * 32 % step_k * kTile;
    for (int t = 0; t < 2; t++, at += tile)
      for (int part = 0; part < 4; part++, from += 64) {
        prefetch_l2(from + kAhead);
        const __m512i bytes = _mm512_loadu_si512(from);
        const __m512i low = _mm512_and_si512(bytes, nibble), high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
        _mm512_storeu_si512(at + 64 * part, _mm512_sub_epi8(low, eight));
        _mm512_storeu_si512(at + 64 * part + 256, _mm512_sub_epi8(high, eight));
      }
  }
}

#endif

}  // namespace skyline
