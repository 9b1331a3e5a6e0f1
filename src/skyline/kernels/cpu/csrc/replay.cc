// Recorded calls of these kernels, made again by one call: what CUDA graphs are to a GPU.
#include <tvm/ffi/container/array.h>

#include <utility>
#include <vector>

#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

struct Recorded {
  ffi::Function function;
  ffi::Array<ffi::Any> held;  // keeps the arguments alive
  std::vector<ffi::AnyView> arguments;
  const uint8_t* next;  // the weight of the first product after this call, and its bytes
  int64_t next_bytes;
};

}  // namespace

// A function without arguments that calls functions[i](*arguments[i]) in turn. Tensors are read where they lie now. weights
// int64 [calls, 2]: where each call reads a packed weight and how many bytes, 0 for none. While threads wait in a call, they
// fetch the beginning of the next weight.
ffi::Function replay(ffi::Array<ffi::Function> functions, ffi::Array<ffi::Array<ffi::Any>> arguments, TensorView weights) {
  const size_t count = functions.size();
  SKYLINE_CHECK(arguments.size() == count && is_int64(weights) && weights.ndim() == 2 && weights.IsContiguous() &&
                    weights.shape()[0] == static_cast<int64_t>(count) && weights.shape()[1] == 2,
                "takes as many lists of arguments as functions, and weights [calls, 2]");
  std::vector<Recorded> calls(count);
  const int64_t* weight = data<int64_t>(weights);
  std::pair<const uint8_t*, int64_t> next{nullptr, 0};
  for (size_t i = count; i-- > 0;) {
    ffi::Array<ffi::Any> held = arguments[i];
    calls[i] = {functions[i], held, {held.begin(), held.end()}, next.first, next.second};
    if (weight[2 * i]) next = {reinterpret_cast<const uint8_t*>(weight[2 * i]), weight[2 * i + 1]};
  }
  return ffi::Function::FromTyped([calls = std::move(calls)] {
    struct Fetching {
      ~Fetching() { ThreadPool::get().fetch_ahead(nullptr, 0); }
    } until_the_end;
    ffi::Any nothing;
    for (const Recorded& call : calls) {
      ThreadPool::get().fetch_ahead(call.next, call.next_bytes);
      call.function.CallPacked(call.arguments.data(), static_cast<int32_t>(call.arguments.size()), &nothing);
    }
  });
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(replay, replay);

}  // namespace skyline
