// Numbers of eight bits as bfloat16, in which they are exact, by their bytes in a table: half the instructions of converting them.
#pragma once

#if defined(__AVX512F__)

#include <immintrin.h>

#include <cstdint>

namespace skyline {

// Integers from -127 to 127. The sign of a number is its highest bit here and in E4m3, and `index` says where in the table it is.
struct Int8 {
  static constexpr int bits(int n) {
    if (n == 0) return 0;
    int exponent = 0;
    while (n >> exponent > 1) exponent++;
    return (127 + exponent) << 7 | ((n << (7 - exponent)) & 127);
  }
  static __m512i index(__m512i bytes) { return _mm512_abs_epi8(bytes); }
};

// float8_e4m3fn (arXiv:2209.05433).
struct E4m3 {
  static constexpr int bits(int n) {
    if (n == 127) return 0x7FC0;  // NaN
    if (n >= 8) return (n >> 3) + 120 << 7 | (n & 7) << 4;
    return n == 0 ? 0 : Int8::bits(n) - (9 << 7);  // below the normal ones: n * 2^-9
  }
  static __m512i index(__m512i bytes) { return bytes; }  // of which seven bits count
};

template <class Number>
struct ByteTable {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr ByteTable() {
    for (int n = 0; n < 128; n++) {
      low[n] = Number::bits(n) & 255;
      high[n] = Number::bits(n) >> 8;
    }
  }
};
template <class Number>
constexpr ByteTable<Number> kByteTable{};

template <class Number>
class ByteNumbers {
 public:
  // Of each 16 bytes, the first 8 and the second.
  __attribute__((always_inline)) void widen(__m512i bytes, __m512i& first, __m512i& second) const {
    const __m512i index = Number::index(bytes);
    const __m512i low = _mm512_permutex2var_epi8(low_[0], index, low_[1]);
    const __m512i size = _mm512_permutex2var_epi8(high_[0], index, high_[1]);
    const __m512i high = _mm512_ternarylogic_epi32(size, bytes, _mm512_set1_epi8(-128), 0xF8);  // | of &
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }

 private:
  static constexpr const ByteTable<Number>& kTable = kByteTable<Number>;
  const __m512i low_[2] = {_mm512_load_si512(kTable.low), _mm512_load_si512(kTable.low + 64)};
  const __m512i high_[2] = {_mm512_load_si512(kTable.high), _mm512_load_si512(kTable.high + 64)};
};

}  // namespace skyline

#endif
