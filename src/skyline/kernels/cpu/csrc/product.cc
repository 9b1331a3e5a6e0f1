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

// c [rows][32] for rows of A along the whole of K, and what is done with it.
void accumulate(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                const uint8_t* next, const Tactic& tactic, Scratch& s, const Finish& finish) {
  if (m.format == Format::kFloat32) {
    const float* x = static_cast<const float*>(a.data) + begin * a.stride;
    accumulate_float(x, a.stride, rows, reinterpret_cast<const float*>(panel), m.k, tactic.piece, s.c);
    finish(0, rows);
  } else {
    accumulate_packed(m, a, begin, rows, panel, next, tactic, s, finish);
  }
}

// use(make(0), ..., make(n - 1)).
template <int n, class Make, class Use>
inline __attribute__((always_inline)) void each_constant(const Make& make, const Use& use) {
  [&]<int... i>(std::integer_sequence<int, i...>) { use(make(i)...); }(std::make_integer_sequence<int, n>());
}

enum class Sums { kFinal, kScaled, kIntegers };  // what c holds

// What sums of a vector of columns are multiplied by and added to, whatever the row. The n columns begin at `place` in panels and are
// features from `feature` on.
template <class T, Sums sums, bool biased>
class Outcome {
 public:
  template <class Count>
  Outcome(const Product<T>& p, int64_t place, int64_t feature, Count n) {
    if constexpr (sums != Sums::kFinal) scale_ = Vec::load(p.weight.scales + place);
#if defined(__AVX512F__) && !defined(__AMX_TILE__)
    if constexpr (sums == Sums::kIntegers) shift_ = _mm512_slli_epi32(_mm512_loadu_si512(p.weight.sums + place), 7);  // Int8Step says why
#endif
    if constexpr (biased) bias_ = Vec::load(p.bias + feature, n);
  }
  // For the sums at c, of a row with this scale.
  Vec operator()(const float* c, float scale) const {
    Vec value;
    if constexpr (sums == Sums::kIntegers) {
      const int32_t* whole = reinterpret_cast<const int32_t*>(c);
#if defined(__AVX512F__) && !defined(__AMX_TILE__)
      value = {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(whole), shift_))};
#else
      value = Vec::load(whole);
#endif
      value = value * (Vec::all(scale) * scale_);
    } else {
      value = Vec::load(c);
      if constexpr (sums == Sums::kScaled) value = value * scale_;
    }
    if constexpr (biased) value = value + bias_;
    return value;
  }

 private:
  Vec scale_, bias_;
#if defined(__AVX512F__) && !defined(__AMX_TILE__)
  __m512i shift_;
#endif
};

Vec gated(const Gating& gating, Vec gate, Vec up) {
  if (gating.alpha == 0) return silu(gate) * up;
  const Vec limit = Vec::all(gating.limit), one = Vec::all(1);
  gate = min(limit, gate);  // of a NaN, max and min return the second operand
  up = max(Vec::zero() - limit, min(limit, up));
  return silu(gate * Vec::all(gating.alpha)) * Vec::all(1 / gating.alpha) * (up + one);
}

// Rows [from, to) of c; row 0 of it is row `begin` of the product. Columns go by first: what is the same for all rows is read once.
template <class T, Sums sums, bool biased>
void finish_as(const Product<T>& p, int64_t begin, int64_t from, int64_t to, int64_t panel, const float* c) {
  using Of = Outcome<T, sums, biased>;
  const PackedMatrix& m = p.weight;
  const Gating gating = p.gating;
  const int64_t first = panel * kPanel, stride = p.out_stride, half = m.n / 2, feature = m.gated ? panel * kTile : first;
  T* out = p.out + begin * stride + feature;
  const float* scales = sums == Sums::kIntegers ? p.a.scales + begin : nullptr;
  const auto scale = [&](int64_t r) { return sums == Sums::kIntegers ? scales[r] : 0.0f; };
  if (m.gated) {
    sweep(std::min(kTile, half - feature), [&](int64_t i, auto n) {
      const Of gate(p, first + i, feature + i, n), up(p, first + kTile + i, half + feature + i, n);
      for (int64_t r = from; r < to; r++) {
        const float* at = c + r * kPanel + i;
        gated(gating, gate(at, scale(r)), up(at + kTile, scale(r))).store(out + r * stride + i, n);
      }
    });
  } else if (m.n - first >= kPanel) {  // a row's line is written at once
    constexpr int vectors = kPanel / Vec::width;
    const auto of = [&](int v) { return Of(p, first + v * Vec::width, first + v * Vec::width, std::integral_constant<int, Vec::width>()); };
    each_constant<vectors>(of, [&](const auto&... value) {
      for (int64_t r = from; r < to; r++) {
        const float* at = c + r * kPanel;
        T* row = out + r * stride;
        ((value(at, scale(r)).store(row), at += Vec::width, row += Vec::width), ...);
      }
    });
  } else {
    sweep(m.n - first, [&](int64_t i, auto n) {
      const Of value(p, first + i, first + i, n);
      for (int64_t r = from; r < to; r++) value(c + r * kPanel + i, scale(r)).store(out + r * stride + i, n);
    });
  }
}

template <class T>
void finish(const Product<T>& p, int64_t begin, int64_t from, int64_t to, int64_t panel, const float* c) {
  const auto as = [&]<Sums sums>(std::integral_constant<Sums, sums>) {
    p.bias ? finish_as<T, sums, true>(p, begin, from, to, panel, c) : finish_as<T, sums, false>(p, begin, from, to, panel, c);
  };
  if (p.weight.format == Format::kInt8) return as(std::integral_constant<Sums, Sums::kIntegers>());
  p.weight.scales ? as(std::integral_constant<Sums, Sums::kScaled>()) : as(std::integral_constant<Sums, Sums::kFinal>());
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
  const auto rows = [&](int64_t r, int64_t count) { finish(product, begin, r, r + count, panel, s.c); };
  const T* out = product.out + begin * product.out_stride + panel * (m.gated ? kTile : kPanel);
  const Finish complete(rows, out, product.out_stride * static_cast<int64_t>(sizeof(T)));
  accumulate(m, product.a, begin, end - begin, m.panel(panel), next < 0 ? nullptr : m.panel(next), product.tactic, s, complete);
}

template void compute_panel<float>(const Product<float>&, int64_t, int64_t, int64_t, int64_t);
template void compute_panel<bf16>(const Product<bf16>&, int64_t, int64_t, int64_t, int64_t);

}  // namespace skyline
