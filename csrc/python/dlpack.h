// Reads torch tensors from C++ without torch's headers. Declares the part of the DLPack C exchange ABI that this takes,
// from its published layout (python/dlpack.h, version 1.3, DLPackExchangeAPI). torch offers it since 2.10, as
// Tensor.__dlpack_c_exchange_api__. It describes a tensor in some 20 ns, while a single Python attribute of a tensor
// costs 50.
#pragma once

#include <cstdint>

namespace adamops {

struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null if contiguous
  uint64_t byte_offset;
};

constexpr int32_t kDlCpu = 1;               // the default; Python passes the types of other devices
constexpr uint8_t kDlInt = 0, kDlUInt = 1;  // those of floats: formats/dtype.h

struct DlExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  DlExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Describes a tensor without taking ownership. Returns 0, or -1 with a Python exception set.
  int (*tensor_from_py_object)(void* py_object, DlTensor* out);
  void* current_work_stream;
};

constexpr const char* kDlExchangeCapsule = "dlpack_exchange_api";

}  // namespace adamops
