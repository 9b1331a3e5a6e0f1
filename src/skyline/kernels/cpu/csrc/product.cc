#include "product.h"

#include <unistd.h>

#include "accumulate.h"
#include "activations.h"

#if defined(__AVX512F__)
#include "accumulate_avx512.h"
#else
#include "accumulate_avx2.h"
#endif

namespace skyline {
namespace {

Scratch& scratch() {
  thread_local Scratch* mine = new Scratch;  // as long as the thread; threads live as long as the process
  return *mine;
}

// Bytes of A that stay in a core's second-level cache while panels go by: half of it.
int64_t cache_bytes() {
  static const int64_t half = [] {
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or -1 where the system does not know
    return std::clamp<int64_t>(size > 0 ? size : 1 << 20, 1 << 18, 1 << 21) / 2;
  }();
  return half;
}

// c [rows][32] = rows of A times a float32 panel.
void accumulate_float(const float* x, int64_t stride, int64_t rows, const float* panel, int64_t k, int64_t piece, float* c) {
#if defined(__AVX512F__)
  const int64_t whole = 0;
#else
  const int64_t whole = k / 32 * 32, blocks = ceil_div(rows, kWideRows);
  for (int64_t k0 = 0; k0 < whole; k0 += piece / 4) {
    const uint8_t* b = reinterpret_cast<const uint8_t*>(panel + k0 * kPanel);
    const int64_t steps = std::min(piece / 4, whole - k0) / 32, bytes = steps * 32 * kPanel * 4;
    const Ahead ahead{b + bytes, b + 2 * bytes};
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t r = rows * i / blocks;
      multiply_widened<Bf16Pairs>(x + r * stride + k0, stride, rows * (i + 1) / blocks - r, b, steps, c + r * kPanel, k0 > 0,
                                  ahead.part(i, blocks));
    }
  }
#endif
  for (int64_t k0 = whole; k0 < k; k0 += piece)
    for (int64_t r = 0; r < rows; r += kFloatRows)
      multiply_float(x + r * stride + k0, stride, std::min<int64_t>(kFloatRows, rows - r), panel + k0 * kPanel,
                     std::min(piece, k - k0), c + r * kPanel, k0 > 0);
}

// c [rows][32] for rows of A along the whole of K.
void accumulate(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                const uint8_t* next, const Tactic& tactic, Scratch& s) {
  if (m.format != Format::kFloat32) return accumulate_packed(m, a, begin, rows, panel, next, tactic, s);
  const float* x = static_cast<const float*>(a.data) + begin * a.stride;
  accumulate_float(x, a.stride, rows, reinterpret_cast<const float*>(panel), m.k, tactic.piece, s.c);
}

// One vector of finished columns of a row: scaled, with bias, still in float32.
template <class T>
Vec finished(const Product<T>& p, const Scratch& s, int64_t row, int64_t r, int64_t column, int64_t place, int64_t feature,
             int count) {
  const PackedMatrix& m = p.weight;
  Vec value;
  if (m.format == Format::kInt8) {
    const int32_t* sums = reinterpret_cast<const int32_t*>(s.c) + r * kPanel + column;
#if defined(__AVX512F__) && !defined(__AMX_TILE__)
    const __m512i shift = _mm512_slli_epi32(_mm512_loadu_si512(m.sums + place), 7);  // Int8Step says why
    value = {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums), shift))};
#else
    value = Vec::load(sums);
#endif
    value = value * (Vec::all(p.a.scales[row]) * Vec::load(m.scales + place));
  } else {
    value = Vec::load(s.c + r * kPanel + column);
    if (m.scales) value = value * Vec::load(m.scales + place);
  }
  return p.bias ? value + Vec::load(p.bias + feature, count) : value;
}

Vec gated(const Gating& gating, Vec gate, Vec up) {
  if (gating.alpha == 0) return silu(gate) * up;
  const Vec limit = Vec::all(gating.limit), one = Vec::all(1);
  gate = min(limit, gate);  // of a NaN, max and min return the second operand
  up = max(Vec::zero() - limit, min(limit, up));
  return silu(gate * Vec::all(gating.alpha)) * Vec::all(1 / gating.alpha) * (up + one);
}

template <class T>
void finish(const Product<T>& p, int64_t begin, int64_t rows, int64_t panel, const Scratch& s) {
  const PackedMatrix& m = p.weight;
  const int64_t first = panel * kPanel;
  if (m.gated) {
    const int64_t half = m.n / 2, feature = panel * kTile, columns = std::min(kTile, half - feature);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < columns; i += Vec::width) {
        const int count = static_cast<int>(std::min<int64_t>(Vec::width, columns - i));
        Vec gate = finished(p, s, begin + r, r, i, first + i, feature + i, count);
        Vec up = finished(p, s, begin + r, r, kTile + i, first + kTile + i, half + feature + i, count);
        gated(p.gating, gate, up).store(p.out + (begin + r) * p.out_stride + feature + i, count);
      }
    return;
  }
  const int64_t columns = std::min(kPanel, m.n - first);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < columns; i += Vec::width) {
      const int count = static_cast<int>(std::min<int64_t>(Vec::width, columns - i));
      finished(p, s, begin + r, r, i, first + i, first + i, count).store(p.out + (begin + r) * p.out_stride + first + i, count);
    }
}

}  // namespace

int64_t max_rows(const PackedMatrix& m, const Tactic& tactic) {
  int64_t fit = cache_bytes() / (m.padded_k() * activation_bytes(m.format)) / kRowBlock * kRowBlock;
  return std::clamp<int64_t>(fit, 4 * kRowBlock, tactic.rows / kRowBlock * kRowBlock);
}

template <class T>
void compute_panel(const Product<T>& product, int64_t begin, int64_t end, int64_t panel, int64_t next) {
  Scratch& s = scratch();
  const PackedMatrix& m = product.weight;
  accumulate(m, product.a, begin, end - begin, m.panel(panel), next < 0 ? nullptr : m.panel(next), product.tactic, s);
  finish(product, begin, end - begin, panel, s);
}

template void compute_panel<float>(const Product<float>&, int64_t, int64_t, int64_t, int64_t);
template void compute_panel<bf16>(const Product<bf16>&, int64_t, int64_t, int64_t, int64_t);

}  // namespace skyline
