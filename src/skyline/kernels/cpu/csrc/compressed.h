// bfloat16 in 12 bits, without loss.
//
// The numbers of a row differ little in size: eight neighbouring values of the upper seven bits of the exponent cover all but about
// one in ten thousand. So of a number's upper byte, which is its sign and those bits, four bits are kept: the sign, and how far
// the rest is below the row's `base`. The lower byte stays as it is. Numbers that are larger, or further below, are exceptions:
// listed with their upper byte, and put right wherever a block of 32 k has one. For few rows, products wait for the weight to come
// from memory, and a quarter less of it comes sooner; what is multiplied is the same to the bit. AVX2 has no use for this: it takes
// longer to multiply than to read.
//
// A panel is a head: 32 bytes of bases, int32 where its exceptions begin among those of the weight, int32 how many they are,
// padded to 64 bytes. Then for each 8 k what four lines of each tile of a bfloat16 panel are made of: codes of tile 0, its first 64
// lower bytes, codes of tile 1, its first 64 lower bytes, the second of tile 0, the second of tile 1. The first lower bytes are those
// of lines 0 and 1, of each 16 bytes 8 of line 0 and 8 of line 1, as the instructions that put two bytes together take them; the
// second those of lines 2 and 3. Codes lie alike, those of lines 0 and 1 in the low and those of 2 and 3 in the high nibbles.
//
// An exception is a uint32: block << 18 | which number of the block as bfloat16 << 8 | upper byte. They ascend.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "packed.h"
#include "repeat.h"
#include "simd.h"
#include "tiles.h"

namespace skyline {

constexpr int64_t kCompressedAhead = 4 * kCompressedStep;  // as far along K as kAhead is in bfloat16
constexpr int kFurthest = 7;  // below its row's base, of what is no exception

// Where the codes and the lower bytes of a tile are among those of four lines: in the order in which they are read.
constexpr int64_t kCompressedFour = kCompressedStep / 4;
constexpr int64_t compressed_codes(int64_t tile) { return 128 * tile; }
constexpr int64_t compressed_lower(int64_t tile, int64_t lines) { return lines ? 256 + 64 * tile : 128 * tile + 64; }

// The exceptions of a panel, from block k0 / 32 on.
class Exceptions {
 public:
  Exceptions(const PackedMatrix& m, const uint8_t* panel, int64_t k0) {
    int32_t range[2];
    std::memcpy(range, panel + kPanel, sizeof range);
    const uint32_t* first = reinterpret_cast<const uint32_t*>(m.sums) + range[0];
    end_ = first + range[1];
    next_ = std::lower_bound(first, end_, static_cast<uint32_t>(k0 / 32 << 18));
  }
  const uint32_t* begin() const { return next_; }
  const uint32_t* end() const { return end_; }
  bool in(int64_t block) const { return next_ < end_ && *next_ >> 18 == block; }
  // lines: the block as bfloat16. Blocks come in order.
  void put_right(int64_t block, uint8_t* lines) {
    for (; in(block); next_++) lines[2 * (*next_ >> 8 & 1023) + 1] = static_cast<uint8_t>(*next_);
  }

 private:
  const uint32_t *next_, *end_;
};

// Where number i of a row is: of its lower byte and its code, and in which nibble.
struct CompressedPlace {
  int64_t low, code;
  int shift;
  CompressedPlace(int64_t place, int64_t i) {
    const int64_t tile = place % kPanel / kTile, lane = place % kTile, line = i % 8 / 2;
    const int64_t four = kCompressedHead + i / 8 * kCompressedFour, in_line = lane / 4 * 16 + line % 2 * 8 + lane % 4 * 2 + i % 2;
    code = four + compressed_codes(tile) + in_line;
    low = four + compressed_lower(tile, line / 2) + in_line;
    shift = static_cast<int>(line / 2 * 4);
  }
};

// Which number of its block as bfloat16 is at (place, i).
inline int64_t compressed_number(int64_t place, int64_t i) {
  return place % kPanel / kTile * 512 + i % 32 / 2 * 32 + place % kTile * 2 + i % 2;
}

// A row's k numbers.
inline void read_compressed_row(const PackedMatrix& m, int64_t place, bf16* to) {
  const uint8_t* panel = m.panel(place / kPanel);
  const int base = panel[place % kPanel];
  for (int64_t i = 0; i < m.k; i++) {
    const CompressedPlace at(place, i);
    const int code = panel[at.code] >> at.shift & 15;
    to[i] = static_cast<bf16>((code & 8) << 12 | (base - (code & kFurthest)) << 8 | panel[at.low]);
  }
  for (const uint32_t exception : Exceptions(m, panel, 0)) {
    const int64_t number = exception >> 8 & 1023, i = (exception >> 18) * 32 + number % 512 / 32 * 2 + number % 2;
    if (compressed_number(place, i) == number) to[i] = static_cast<bf16>((exception & 255) << 8 | (to[i] & 255));
  }
}

// Writes rows of bfloat16, all in one tile, to their panel, and lists the exceptions: panel << 32 | exception.
class Compressor {
 public:
  Compressor(const PackedMatrix& matrix, std::vector<int64_t>& exceptions) : m_(matrix), exceptions_(exceptions) {}

  // rows: `count` rows of padded_k() numbers, zeros after m.k, the first at `place`.
  void write(const bf16* const* rows, int64_t count, int64_t place) {
    uint8_t* panel = m_.data + place / kPanel * m_.panel_bytes();
    for (int64_t r = 0; r < count; r++) panel[place % kPanel + r] = base(rows[r]);
    if (count == kTile) return write_tile(rows, panel, place);
    for (int64_t r = 0; r < count; r++)
      for (int64_t i = 0; i < m_.padded_k(); i++) {
        const CompressedPlace at(place + r, i);
        const uint8_t upper = static_cast<uint8_t>(rows[r][i] >> 8);
        const int below = panel[place % kPanel + r] - (upper & 127);
        if (below != (below & kFurthest)) list(place + r, i, upper);
        panel[at.low] = static_cast<uint8_t>(rows[r][i]);
        panel[at.code] &= static_cast<uint8_t>(0xF0 >> at.shift);
        panel[at.code] |= static_cast<uint8_t>(((below & kFurthest) | (upper >> 7 << 3)) << at.shift);
      }
  }

 private:
  void list(int64_t place, int64_t i, uint8_t upper) {
    if (i < m_.k) exceptions_.push_back(place / kPanel << 32 | i / 32 << 18 | compressed_number(place, i) << 8 | upper);
  }

  // The highest of the eight neighbouring values of the exponent's upper half that leave out the fewest numbers of a row.
  uint8_t base(const bf16* row) const {
    int most = 0;
    int64_t below = 0;
    for (int64_t i = 0; i < m_.k; i++) most = std::max(most, row[i] >> 8 & 127);
    for (int64_t i = 0; i < m_.k; i++) below += (row[i] >> 8 & 127) + kFurthest < most;
    if (below * 1024 <= m_.k) return static_cast<uint8_t>(most);
    int64_t found[128] = {}, covered = 0, best = -1;
    for (int64_t i = 0; i < m_.k; i++) found[row[i] >> 8 & 127]++;
    for (int top = 0; top < 128; top++) {
      covered += found[top] - (top > kFurthest ? found[top - kFurthest - 1] : 0);
      if (covered > best) best = covered, most = top;
    }
    return static_cast<uint8_t>(most);
  }

  void write_tile(const bf16* const* rows, uint8_t* panel, int64_t place) {
    const int64_t tile = place % kPanel / kTile;
    __m256i bases[2];
    for (int half = 0; half < 2; half++) {
      alignas(32) uint8_t each[32];
      for (int b = 0; b < 32; b++) each[b] = panel[tile * kTile + 8 * half + b / 16 * 4 + b % 8 / 2];
      bases[half] = _mm256_load_si256(reinterpret_cast<const __m256i*>(each));
    }
    const __m256i lower = _mm256_set1_epi16(255), size = _mm256_set1_epi8(127), furthest = _mm256_set1_epi8(kFurthest);
    for (int64_t k0 = 0; k0 < m_.padded_k(); k0 += 8) {
      uint8_t* four = panel + kCompressedHead + k0 / 8 * kCompressedFour;
      alignas(32) uint32_t lines[4][kTile];
      for (int r = 0; r < kTile; r++)
        for (int line = 0; line < 4; line++) std::memcpy(&lines[line][r], rows[r] + k0 + 2 * line, 4);
      for (int half = 0; half < 2; half++) {
        __m256i both = _mm256_setzero_si256();
        for (int two = 0; two < 2; two++) {
          const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(lines[2 * two] + 8 * half));
          const __m256i b = _mm256_load_si256(reinterpret_cast<const __m256i*>(lines[2 * two + 1] + 8 * half));
          const __m256i low = _mm256_packus_epi16(_mm256_and_si256(a, lower), _mm256_and_si256(b, lower));
          const __m256i upper = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
          const __m256i below = _mm256_sub_epi8(bases[half], _mm256_and_si256(upper, size));
          const __m256i near = _mm256_and_si256(below, furthest);
          const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(upper, 4), _mm256_set1_epi8(8));
          const __m256i code = _mm256_or_si256(near, sign);
          both = _mm256_or_si256(both, two ? _mm256_slli_epi16(code, 4) : code);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(four + compressed_lower(tile, two) + 32 * half), low);
          uint32_t far = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(near, below)));
          for (; far; far &= far - 1) {
            const int b8 = __builtin_ctz(far), lane = 8 * half + b8 / 16 * 4 + b8 % 8 / 2;
            const int64_t i = k0 + 4 * two + b8 % 16 / 8 * 2 + b8 % 2;
            list(place + lane, i, static_cast<uint8_t>(rows[lane][i] >> 8));
          }
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(four + compressed_codes(tile) + 32 * half), both);
      }
    }
  }

  const PackedMatrix& m_;
  std::vector<int64_t>& exceptions_;
};

#if defined(__AVX512F__)

// What a compressed panel is as bfloat16, from k0 on: as Int8Columns, but two pairs at a time, which have most in common. asks: for
// its own memory, before it is needed.
template <bool asks>
class CompressedColumns {
 public:
  static constexpr bool kAsks = asks;
  CompressedColumns(const PackedMatrix& m, const uint8_t* panel, int64_t k0)
      : from_(panel + kCompressedHead + (k0 / 32 - 1) * kCompressedStep), block_(k0 / 32 - 1), exceptions_(m, panel, k0) {
    alignas(64) uint8_t row[64];  // of each place in a line
    for (int b = 0; b < 64; b++) row[b] = static_cast<uint8_t>(b / 16 * 4 + b % 8 / 2);
    repeat<2>(SKYLINE_EACH(t) {
      const __m512i rows = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + kTile * t)));
      bases_[t] = _mm512_shuffle_epi8(rows, _mm512_load_si512(row));
    });
  }
  void begin() {
    from_ += kCompressedStep;
    block_++;
  }
  // Pairs 2 h and 2 h + 1 of q, of tile t.
  template <int t, int h>
  __attribute__((always_inline)) void pairs(int64_t q, __m512i& first, __m512i& second) const {
    const uint8_t* four = from_ + q * kCompressedFour;
    // Line by line, which is faster than all of a block at once.
    if constexpr (asks) repeat<h ? 1 : 2>(SKYLINE_EACH(i) {
      ask_for(four + kCompressedAhead + (h ? compressed_lower(t, 1) : compressed_codes(t) + 64 * i));
    });
    const __m512i codes = _mm512_loadu_si512(four + compressed_codes(t)), low = _mm512_loadu_si512(four + compressed_lower(t, h));
    // Only the lowest six bits of a byte count, and the table is there four times.
    const __m512i upper = _mm512_permutexvar_epi8(h ? _mm512_srli_epi16(codes, 4) : codes, uppers_);
    const __m512i with_base = _mm512_add_epi8(bases_[t], upper);
    first = _mm512_unpacklo_epi8(low, with_base);
    second = _mm512_unpackhi_epi8(low, with_base);
  }
  // Whether the block that `begin` was called for has exceptions, which `put_right` then puts right in the block as bfloat16.
  bool irregular() const { return exceptions_.in(block_); }
  void put_right(uint8_t* lines) { exceptions_.put_right(block_, lines); }

 private:
  const uint8_t* from_;
  int64_t block_;
  Exceptions exceptions_;
  __m512i bases_[2];
  const __m512i uppers_ = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, -1, -2, -3, -4, -5, -6, -7, -128, 127, 126, 125, 124, 123, 122, 121));  // added to a base
};

#endif

}  // namespace skyline
