// Stands for base.cuh: shared memory is an array that starts at address 0, and knows its end.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE inline
#define FULL_WARP 0xffffffffu

// What the driver would encode, the innermost dimension first; `copies` counts what was copied.
struct TensorMap {
  const u8* gmem;
  i64 strides[3];  // bytes
  int shape[4], box[2];
  int element;  // bytes
  int* copies;
};

template <class T> T& shared(u32 address) {
  if (address % alignof(T) || address + sizeof(T) > SMEM_BYTES)
    fail("no such address in shared memory: %u", address);
  return *(T*)(dynamic_smem + address);
}
DEVICE u32 shared_address(const void* p) { return (u32)((const u8*)p - dynamic_smem); }
DEVICE u32 load_shared(u32 address) { return shared<u32>(address); }
DEVICE float load_shared_float(u32 address) { return shared<float>(address); }
DEVICE uint2 load_shared_pair(u32 address) { return shared<uint2>(address); }
DEVICE float4 load_shared_floats(u32 address) { return shared<float4>(address); }
DEVICE void store_shared(u32 address, u32 value) { shared<u32>(address) = value; }
// Where a byte of rows of `row_bytes` lies: chunks of 16 bytes change places by row.
DEVICE u32 swizzled(u32 address, u32 row_bytes) { return address ^ (address >> 3 & row_bytes - 16); }
