// What the accumulation of products works with: included by product.cc only, like accumulate_avx2.h and accumulate_avx512.h.
#pragma once

#include <cstring>

#include "product.h"
#include "tiles.h"

namespace skyline {

constexpr int64_t kMostRows = 512, kMostPiece = 512;  // of any tactic
constexpr int64_t kGroups = 4;                        // of int4, multiplied before their sums are added up

struct alignas(64) Scratch {
  float c[kMostRows * kPanel];
#if defined(__AMX_TILE__)
  int32_t partial[kGroups * kRowBlock * kPanel];
#endif
#if defined(__AVX512F__)
  uint8_t b[kMostPiece * kPanel * 2];
#else
  uint8_t wide[kMostPiece * kPanel * 2];
  uint8_t pairs[kMostPiece / 4 * kPanel * 2];
  float partial[kMostRows * kPanel];
#endif
};

// What is done with rows [r, r + count) of c when they are complete: with AVX-512 at once, while they are in the nearest cache. Called
// once for each row.
class Finish {
 public:
  // out: where row 0 will be written, and what lies between rows, in bytes.
  template <class Rows>
  Finish(const Rows& rows, const void* out, int64_t stride)
      : call_([](const void* rows, int64_t r, int64_t count) { (*static_cast<const Rows*>(rows))(r, count); }), rows_(&rows),
        out_(static_cast<const char*>(out)), stride_(stride) {}
  void operator()(int64_t r, int64_t count) const { call_(rows_, first_ + r, count); }
  // Asks for the first line that each row will be written to, before a block of rows is multiplied: stores are made in order, so each
  // would wait for its own. (A line is a row of 32 bfloat16.)
  void ask(int64_t r, int64_t count) const {
    for (int64_t i = r; i < r + count; i++) prefetch_to_write(out_ + (first_ + i) * stride_);
  }
  // The same with rows counted from r on.
  Finish from(int64_t r) const {
    Finish rest = *this;
    rest.first_ += r;
    return rest;
  }

 private:
  void (*call_)(const void*, int64_t, int64_t);
  const void* rows_;
  const char* out_;
  int64_t stride_, first_ = 0;
};

// What there is of bytes and six bits as types, so that its properties are constants to the compiler.
template <int64_t group, bool offsets, bool six>
struct Bytes {};

template <class As>
void dispatch_bytes(const PackedMatrix& m, const As& as) {
  if (m.format == Format::kSixBits) return as(Bytes<16, false, true>());
  if (m.group == 16) return m.zeros ? as(Bytes<16, true, false>()) : as(Bytes<16, false, false>());
  return m.zeros ? as(Bytes<32, true, false>()) : as(Bytes<32, false, false>());
}

#if defined(__AVX512F__)
inline Vec widen_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
#else
inline Vec widen_half(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
#endif

}  // namespace skyline
