// cp.async: 16 bytes from global to shared memory.

__device__ __forceinline__ void cp_async_16(unsigned to_smem, const void* from_gmem) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to_smem), "l"(from_gmem)
               : "memory");
}

// The first `bytes` of the 16, then zeros.
__device__ __forceinline__ void cp_async_part(unsigned to_smem, const void* from_gmem, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to_smem),
               "l"(from_gmem), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most PENDING of this thread's newest groups are under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
