// The thread pool, as Python sees it.
#include <tvm/ffi/container/array.h>

#include "tensors.h"
#include "threads.h"

namespace skyline {

// cpus int32 [n]: the CPU of each thread, the calling one first; -1 leaves a thread unpinned.
void pool_start(TensorView cpus) {
  SKYLINE_CHECK(is_int32(cpus) && cpus.ndim() == 1, "takes a vector of int32");
  const int32_t* list = data<int32_t>(cpus);
  ThreadPool::get().start(std::vector<int>(list, list + cpus.shape()[0]));
}
void pool_stop() { ThreadPool::get().stop(); }
void begin_step() { ThreadPool::get().begin_step(); }
void end_step() { ThreadPool::get().end_step(); }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(pool_start, pool_start);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pool_stop, pool_stop);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(begin_step, begin_step);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(end_step, end_step);

}  // namespace skyline
