// What this machine can do at most: loops that read memory, or that only compute, to compare kernels with.
#include <algorithm>
#include <vector>

#include "amx.h"
#include "packed.h"
#include "simd.h"
#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

// The accumulators become opaque once a turn, so that no compiler can merge the turns.
template <class V>
inline __attribute__((always_inline)) void keep(V& a) {
  asm volatile("" : "+v"(a));
}

// Independent chains of additions: two units, of which each takes 4 to 6 cycles until a result can be added to again.
constexpr double kVectorChains = 12;

template <class V, class Step>
inline __attribute__((always_inline)) void turn_vectors(V start, int64_t turns, const Step& step) {
  V a0 = start, a1 = start, a2 = start, a3 = start, a4 = start, a5 = start;
  V a6 = start, a7 = start, a8 = start, a9 = start, a10 = start, a11 = start;
  for (int64_t i = 0; i < turns; i++) {
    a0 = step(a0), a1 = step(a1), a2 = step(a2), a3 = step(a3), a4 = step(a4), a5 = step(a5);
    a6 = step(a6), a7 = step(a7), a8 = step(a8), a9 = step(a9), a10 = step(a10), a11 = step(a11);
    keep(a0), keep(a1), keep(a2), keep(a3), keep(a4), keep(a5);
    keep(a6), keep(a7), keep(a8), keep(a9), keep(a10), keep(a11);
  }
}

#if defined(__AMX_TILE__)
template <bool integer>
void turn_tiles(int64_t turns) {
  TileConfig config;
  for (int i = 0; i < 8; i++) config.set(i, 16);
  config.load();
  alignas(64) uint16_t ones[512];
  for (uint16_t& one : ones) one = integer ? 0x0101 : 0x3F80;
  tile_fence();
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t i = 0; i < turns; i++) {
    if constexpr (integer) {
      _tile_dpbssd(0, 6, 7);
      _tile_dpbssd(1, 6, 7);
      _tile_dpbssd(2, 6, 7);
      _tile_dpbssd(3, 6, 7);
      _tile_dpbssd(4, 6, 7);
      _tile_dpbssd(5, 6, 7);
    } else {
      _tile_dpbf16ps(0, 6, 7);
      _tile_dpbf16ps(1, 6, 7);
      _tile_dpbf16ps(2, 6, 7);
      _tile_dpbf16ps(3, 6, 7);
      _tile_dpbf16ps(4, 6, 7);
      _tile_dpbf16ps(5, 6, 7);
    }
  }
}
#endif

// Runs `turns` turns of the instruction that products of this format are made of; returns the operations of one turn.
double turn(Format format, int64_t turns) {
#if defined(__AMX_TILE__)
  if (format == Format::kBfloat16) return turn_tiles<false>(turns), 6 * 16 * 16 * 32 * 2.0;
  if (format != Format::kFloat32) return turn_tiles<true>(turns), 6 * 16 * 16 * 64 * 2.0;
#elif defined(__AVX512F__)
  if (format == Format::kBfloat16) {
    __m512i ones = _mm512_set1_epi16(0x3F80);
    keep(ones);
    turn_vectors(_mm512_setzero_ps(), turns, [&](__m512 a) { return _mm512_dpbf16_ps(a, (__m512bh)ones, (__m512bh)ones); });
    return kVectorChains * 32 * 2;
  }
  if (format == Format::kInt8 || format == Format::kInt4) {
    __m512i ones = _mm512_set1_epi8(1);
    keep(ones);
    turn_vectors(_mm512_setzero_si512(), turns, [&](__m512i a) { return _mm512_dpbusd_epi32(a, ones, ones); });
    return kVectorChains * 64 * 2;
  }
#else
  if (format == Format::kInt8) {  // as in tiles_avx2.h: pairs of 16 bits
    __m256i ones = _mm256_set1_epi16(1);
    keep(ones);
    turn_vectors(_mm256_setzero_si256(), turns, [&](__m256i a) {
      __m256i x = ones;
      keep(x);
      return _mm256_add_epi32(a, _mm256_madd_epi16(x, ones));
    });
    return kVectorChains * 16 * 2;
  }
  if (format == Format::kInt4) {
    __m256i ones = _mm256_set1_epi8(1);
    keep(ones);
    turn_vectors(_mm256_setzero_si256(), turns, [&](__m256i a) {
      __m256i x = ones;
      keep(x);
      return _mm256_add_epi16(a, _mm256_maddubs_epi16(x, ones));
    });
    return kVectorChains * 32 * 2;
  }
#endif
  Vec x = Vec::all(1.0f);
  keep(x.v);
  turn_vectors(x.v, turns, [&](decltype(x.v) a) { return fma(x, x, Vec{a}).v; });
  return kVectorChains * Vec::width * 2;
}

uint64_t sum_lines(const uint64_t* p, int64_t lines) {
  __m256i sums[8] = {};
  for (int64_t i = 0; i + 4 <= lines; i += 4, p += 32)
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
      sums[j] = _mm256_add_epi64(sums[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 4 * j)));
  for (int j = 1; j < 8; j++) sums[0] = _mm256_add_epi64(sums[0], sums[j]);
  alignas(32) uint64_t part[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(part), sums[0]);
  return part[0] + part[1] + part[2] + part[3];
}

}  // namespace

// Sum of memory [n] int64, n a multiple of 32: read once, in order, by all threads or by the calling one alone.
int64_t machine_read(TensorView memory, bool all_threads) {
  SKYLINE_CHECK(is_int64(memory) && memory.ndim() == 1 && memory.shape()[0] % 32 == 0, "takes int64 in blocks of 32");
  const uint64_t* from = data<const uint64_t>(memory);
  const int64_t blocks = memory.shape()[0] / 32;
  if (!all_threads) return static_cast<int64_t>(sum_lines(from, blocks * 4));
  const int64_t pieces = std::clamp<int64_t>(blocks / 256, 1, 16 * ThreadPool::get().size());
  std::vector<uint64_t> sums(pieces);
  ThreadPool::get().run(pieces, [&](int64_t i) {
    const int64_t begin = blocks * i / pieces, end = blocks * (i + 1) / pieces;
    sums[i] = sum_lines(from + begin * 32, (end - begin) * 4);
  });
  uint64_t total = 0;
  for (int64_t i = 0; i < pieces; i++) total += sums[i];
  return static_cast<int64_t>(total);
}

// Fills memory [n] int64 with ones, the pages of each part by one of the threads that will read them.
void machine_fill(TensorView memory) {
  SKYLINE_CHECK(is_int64(memory) && memory.ndim() == 1, "takes int64");
  int64_t* to = data<int64_t>(memory);
  ThreadPool::get().run_ranges(memory.shape()[0], 1 << 16, [&](int64_t begin, int64_t end) { std::fill(to + begin, to + end, 1); });
}

// Operations (a multiply and an add are two) that were done: `turns` turns on one thread, or as many on each.
double machine_compute(int64_t format, int64_t turns, bool all_threads) {
  const auto kind = static_cast<Format>(format);
  SKYLINE_CHECK(kind != Format::kInt8WeightOnly, "multiplies in bfloat16");
  if (!all_threads) return turn(kind, turns) * static_cast<double>(turns);
  // Small shares, so that a thread that starts late leaves some of its to the others.
  const int64_t shares = 16 * ThreadPool::get().size(), share = std::max<int64_t>(turns / 16, 1);
  double operations = turn(kind, 1);
  ThreadPool::get().run(shares, [&](int64_t) { turn(kind, share); });
  return operations * static_cast<double>(shares * share);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(machine_read, machine_read);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(machine_fill, machine_fill);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(machine_compute, machine_compute);

}  // namespace skyline
