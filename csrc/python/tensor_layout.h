// Where torch keeps, in memory, what proves that a tensor's address may be used: the kind of tensor, where its storage
// begins and ends, and its version counter. The offsets differ between releases of torch, so
// adamops/optim/backends/tensor_layout.py finds them by experiment when the op is loaded. It gives up if anything is
// unclear; every tensor is then checked through torch's Python API, which takes some 300 ns where this takes 3.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace adamops {

using VersionCounter = std::atomic<uint32_t>;

// Increments a tensor's version, as every in-place operation of torch does, so that autograd notices that a value it
// has saved was overwritten.
inline void count_write(VersionCounter& counter) {
  // Not fetch_add(), which would wait for each counter to arrive from memory before requesting the next. If two threads
  // write a tensor at once, one increment may be lost; the other is enough.
  counter.store(counter.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

struct TensorLayout {
  // Offsets in bytes.
  int64_t impl;                               // in the Python object: the pointer to torch's TensorImpl
  int64_t key_set, storage, version_counter;  // in the TensorImpl
  int64_t data, nbytes;                       // in the StorageImpl
  int64_t version;                            // in the version counter
  // The values found there in a plain tensor. They rule out subclasses of TensorImpl and StorageImpl, tensors that are
  // lazily negated or conjugated, zero tensors, and tensors that a mode or transform of torch has wrapped.
  uint64_t tensor_type, storage_type, plain_keys;

  // The version counter of `tensor` if its storage contains the `size` bytes at `address`; otherwise null. The type of
  // `tensor` must be one whose instances are torch tensors. The counter lives as long as this tensor, or one that
  // shares its memory.
  VersionCounter* version_if_valid(const PyObject* tensor, const char* address, int64_t size) const {
    const char* const tensor_impl = at<const char*>(tensor, impl);
    if (!tensor_impl || at<uint64_t>(tensor_impl, 0) != tensor_type || at<uint64_t>(tensor_impl, key_set) != plain_keys)
      return nullptr;
    const char* const storage_impl = at<const char*>(tensor_impl, storage);
    if (!storage_impl || at<uint64_t>(storage_impl, 0) != storage_type) return nullptr;
    char* const counter = at<char*>(tensor_impl, version_counter);
    if (!counter) return nullptr;    // created in inference mode, then given other data
    __builtin_prefetch(counter, 1);  // for count_write()
    auto* const found = reinterpret_cast<VersionCounter*>(counter + version);
    const char* const begin = at<const char*>(storage_impl, data);
    const int64_t length = at<int64_t>(storage_impl, nbytes);
    if (size == 0) return found;
    const bool fits = begin && length >= size && address >= begin && address - begin <= length - size;
    return fits ? found : nullptr;
  }

 private:
  template <class T>
  static T at(const void* from, int64_t offset) {
    T value;
    std::memcpy(&value, static_cast<const char*>(from) + offset, sizeof value);
    return value;
  }
};

// Binds TensorLayout, local to the module.
inline void bind_tensor_layout(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<TensorLayout>(module, "TensorLayout", "Where torch keeps what proves a tensor's address; in bytes.",
                           py::module_local())
      .def(py::init([](int64_t impl, int64_t key_set, int64_t storage, int64_t version_counter, int64_t data,
                       int64_t nbytes, int64_t version, uint64_t tensor_type, uint64_t storage_type,
                       uint64_t plain_keys) {
             return TensorLayout{impl,   key_set, storage,     version_counter, data,
                                 nbytes, version, tensor_type, storage_type,    plain_keys};
           }),
           py::kw_only(), py::arg("impl"), py::arg("key_set"), py::arg("storage"), py::arg("version_counter"),
           py::arg("data"), py::arg("nbytes"), py::arg("version"), py::arg("tensor_type"), py::arg("storage_type"),
           py::arg("plain_keys"));
}

}  // namespace adamops
