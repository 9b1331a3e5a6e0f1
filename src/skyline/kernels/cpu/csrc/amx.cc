// Permission to use AMX, which Linux gives to a process on request
// (https://docs.kernel.org/arch/x86/xstate.html).
#include <sys/syscall.h>
#include <unistd.h>

#include "tensors.h"

namespace skyline {

// Whether this process, and threads it starts from now on, may use the tile registers.
bool amx_request() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(amx_request, amx_request);

}  // namespace skyline
