// Loops that are unrolled before the compiler looks at them: GCC keeps arrays in registers only where it early sees no index
// but constants.
#pragma once

#include <utility>

namespace skyline {

// body(0) to body(N - 1), each index a constant of its own type.
template <int N, class Body>
inline __attribute__((always_inline)) void repeat(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, N>());
}

// The head of such a body, which inlines it: repeat<4>(SKYLINE_EACH(i) { ... });
#define SKYLINE_EACH(i) [&](auto i) __attribute__((always_inline))

}  // namespace skyline
