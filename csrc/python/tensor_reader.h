// Reads torch tensors from C++ through torch's DLPack exchange table, but only plain ones: exactly one of the given
// types (not a subclass, whose data may live elsewhere), on the given device, contiguous, of a dtype that the kernels
// know, with all elements in their storage. Also takes the local tensors out of DTensors. Everything else is left to
// Python, which also words the errors. Must not know of optimizers.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>

#include "formats/dtype.h"
#include "python/dlpack.h"
#include "python/tensor_layout.h"

namespace adamops {

class TensorReader {
 public:
  // `capsule` is Tensor.__dlpack_c_exchange_api__; `types` are the Python types to read; the device is in DLPack's
  // terms.
  TensorReader(const pybind11::object& capsule, const std::array<pybind11::type, 2>& types, const TensorLayout& layout,
               int32_t device_type, int32_t device_id)
      : capsule_(capsule), types_(types), layout_(layout), device_type_(device_type), device_id_(device_id) {
    api_ = static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), kDlExchangeCapsule));
    if (!api_) throw pybind11::error_already_set();
    if (api_->major_version != 1 || !api_->tensor_from_py_object)
      throw pybind11::value_error("this DLPack exchange table is of another version");
  }

  struct View {
    DlTensor tensor;
    Dtype dtype;
    int64_t numel;
    VersionCounter* version;

    void* address() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
    bool same_shape(const View& other) const {
      return tensor.ndim == other.tensor.ndim &&
             std::equal(tensor.shape, tensor.shape + tensor.ndim, other.tensor.shape);
    }
  };

  bool is_plain(PyObject* object) const {
    const auto* const type = reinterpret_cast<const PyObject*>(Py_TYPE(object));
    return type == types_[0].ptr() || type == types_[1].ptr();
  }

  // DTensor's type, or None. A DTensor's `_local_tensor` is what this rank holds, and its `_spec` is how it was
  // sharded. The type is set late: torch.distributed is slow to import, and most programs never need it.
  pybind11::object sharded_type = pybind11::none();

  bool is_sharded(PyObject* object) const {
    return reinterpret_cast<const PyObject*>(Py_TYPE(object)) == sharded_type.ptr();
  }

  // The local tensor of a DTensor: what this rank holds.
  pybind11::object local(PyObject* sharded) const { return attribute(sharded, names_.local_tensor); }

  // Whether two DTensors are sharded the same way. Usually they share one spec.
  bool sharded_alike(PyObject* sharded, PyObject* other) const {
    const pybind11::object spec = attribute(sharded, names_.spec), other_spec = attribute(other, names_.spec);
    if (spec.is(other_spec)) return true;
    for (PyObject* const name : {names_.placements, names_.mesh}) {
      const int equal =
          PyObject_RichCompareBool(attribute(spec.ptr(), name).ptr(), attribute(other_spec.ptr(), name).ptr(), Py_EQ);
      if (equal < 0) throw pybind11::error_already_set();
      if (!equal) return false;
    }
    return true;
  }

  // Reads a plain tensor of a dtype that the kernels compute in.
  bool read(PyObject* object, View& view) const {
    if (!read_any(object, view)) return false;
    for (int dtype = 0; dtype < kDtypeCount; ++dtype) {
      const DtypeFacts& facts = kDtypes[dtype];
      if (view.tensor.dtype_code != facts.dlpack_code || view.tensor.dtype_bits != 8 * facts.bytes) continue;
      view.dtype = static_cast<Dtype>(dtype);
      return true;
    }
    return false;
  }

  // Reads a plain tensor of integers with this signedness and this many bits.
  bool read_integers(PyObject* object, bool is_signed, int bits, View& view) const {
    return read_any(object, view) && view.tensor.dtype_code == (is_signed ? kDlInt : kDlUInt) &&
           view.tensor.dtype_bits == bits;
  }

 private:
  // Reads a plain tensor of any dtype, without checking the dtype.
  bool read_any(PyObject* object, View& view) const {
    if (!is_plain(object)) return false;
    if (api_->tensor_from_py_object(object, &view.tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    const DlTensor& tensor = view.tensor;
    if (tensor.device_type != device_type_ || tensor.device_id != device_id_ || tensor.dtype_lanes != 1) return false;
    view.numel = 1;
    bool contiguous = true;
    for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
      if (tensor.strides && tensor.shape[i] != 1 && tensor.strides[i] != view.numel) contiguous = false;
      view.numel *= tensor.shape[i];
    }
    const bool aligned = reinterpret_cast<uintptr_t>(view.address()) % std::max(tensor.dtype_bits / 8, 1) == 0;
    if ((!contiguous && view.numel != 0) || !aligned) return false;
    view.version = layout_.version_if_valid(object, static_cast<const char*>(view.address()),
                                            view.numel * (tensor.dtype_bits / 8));
    return view.version;
  }

  static pybind11::object attribute(PyObject* object, PyObject* name) {
    auto value = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(object, name));
    if (!value) throw pybind11::error_already_set();
    return value;
  }

  struct Names {
    PyObject* local_tensor = PyUnicode_InternFromString("_local_tensor");
    PyObject* spec = PyUnicode_InternFromString("_spec");
    PyObject* placements = PyUnicode_InternFromString("placements");
    PyObject* mesh = PyUnicode_InternFromString("mesh");
  };

  Names names_;  // never released, like the interned names in a program's code
  pybind11::object capsule_;
  std::array<pybind11::type, 2> types_;
  TensorLayout layout_;
  int32_t device_type_, device_id_;
  const DlExchangeApi* api_;
};

}  // namespace adamops
