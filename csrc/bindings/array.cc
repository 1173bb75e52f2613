#include "bindings/array.h"

#include <dlfcn.h>
#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/check.h"

namespace pared {
namespace {

// Interned once: an attribute look-up with a ready string costs 40 ns, building the string as much again.
struct Names {
  py::object data_ptr = intern("data_ptr"), dtype = intern("dtype"), shape = intern("shape"),
             stride = intern("stride"), is_cpu = intern("is_cpu"), device = intern("device"),
             layout = intern("layout"), is_neg = intern("is_neg"), requires_grad = intern("requires_grad");
  static py::object intern(const char* s) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(s));
  }
};
const Names& names() {
  static const Names* n = new Names;  // leaked: outlives the interpreter's teardown order
  return *n;
}

py::object attr(py::handle o, const py::object& name) {
  PyObject* v = PyObject_GetAttr(o.ptr(), name.ptr());
  if (!v) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(v);
}

py::object call(py::handle o, const py::object& name) {
  PyObject* v = PyObject_CallMethodNoArgs(o.ptr(), name.ptr());
  if (!v) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(v);
}

// What DLPack's exchange interface (dlpack.h, version 1) says of a tensor without taking hold of it. One call
// in C instead of six attributes in Python, each of which comes from memory once a model has run in between.
struct DlTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  static constexpr const char *kAttribute = "__dlpack_c_exchange_api__", *kCapsule = "dlpack_exchange_api";
  static constexpr uint32_t kMajor = 1;
  static constexpr int32_t kCpu = 1;
  uint32_t major, minor;
  const void *previous, *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DlTensor* out);
};

// The dtypes that any operation takes: torch's name, DLPack's kind (0 signed, 1 unsigned, 2 float, 4 bfloat,
// 6 bool) and bits, torch's number (c10::ScalarType, which its files hold).
struct TypeRow {
  const char* name;
  DType value;
  int dlpack_kind, bits, torch_number;
};
constexpr TypeRow kTypes[] = {
    {"float32", DType::f32, 2, 32, 6},  {"bfloat16", DType::bf16, 4, 16, 15},
    {"float16", DType::f16, 2, 16, 5},  {"uint8", DType::u8, 1, 8, 0},
    {"bool", DType::boolean, 6, 8, 11}, {"int64", DType::i64, 0, 64, 4},
    {"int32", DType::i32, 0, 32, 3},    {"int8", DType::i8, 0, 8, 1},
    {"float64", DType::f64, 2, 64, 7},  {"int16", DType::i16, 0, 16, 2},
};

// New tensors, by torch's own C interface (aoti_torch/c/shim.h) and the function with which its bindings make
// an object of one: once other code has run in between, torch.empty takes 10 us and this 4. A handle points
// to an at::Tensor.
struct TorchNew {
  int32_t (*empty)(int64_t ndim, const int64_t* shape, const int64_t* strides, int32_t dtype,
                   int32_t device_type, int32_t device, void** handle) = nullptr;
  int32_t (*data)(void* handle, void** out) = nullptr;
  int32_t (*release)(void* handle) = nullptr;
  PyObject* (*wrap)(const void* tensor) = nullptr;

  // An empty object when torch says no. `shape` ends with the innermost axis.
  NewArray operator()(int torch_number, const int64_t* shape, int ndim) const {
    int64_t strides[Array::kMaxDims], step = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      strides[i] = step;
      step *= std::max<int64_t>(shape[i], 1);
    }
    constexpr int32_t kCpu = 0;
    void *handle = nullptr, *data = nullptr;
    if (empty(ndim, shape, strides, torch_number, kCpu, 0, &handle) != 0) return {};
    PyObject* object = this->data(handle, &data) == 0 ? wrap(handle) : nullptr;
    release(handle);
    return {py::reinterpret_steal<py::object>(object), data};
  }
};

struct TorchTypes {
  py::object tensor, parameter, strided, empty, grad_enabled;
  const DlExchange* exchange;  // null before torch 2.10
  TorchNew new_tensor;         // without functions where torch does not export them, or they act otherwise
  // torch's dtypes are singletons: looked up once, compared by identity.
  std::pair<py::object, DType> dtypes[std::size(kTypes)];
};

bool is_tensor_of(py::handle o, const TorchTypes& torch) {
  return PyObject_TypeCheck(o.ptr(), reinterpret_cast<PyTypeObject*>(torch.tensor.ptr()));
}

const DlExchange* find_exchange(const py::object& tensor_type) {
  if (!py::hasattr(tensor_type, DlExchange::kAttribute)) return nullptr;
  const py::object capsule = tensor_type.attr(DlExchange::kAttribute);
  if (!PyCapsule_IsValid(capsule.ptr(), DlExchange::kCapsule)) return nullptr;
  const auto* e = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), DlExchange::kCapsule));
  return e->major == DlExchange::kMajor && e->tensor_from_object ? e : nullptr;
}

// A module that somebody has imported, else nothing. Another thread may take it out of sys.modules meanwhile.
py::object imported(const char* name) {
  PyObject* modules = PyImport_GetModuleDict();
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  if (PyDict_GetItemStringRef(modules, name, &found) < 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
#else
  return py::reinterpret_borrow<py::object>(PyDict_GetItemString(modules, name));  // under the GIL
#endif
}

std::string type_name(py::handle o) { return py::str(py::type::handle_of(o).attr("__name__")); }

[[noreturn]] void refuse_dtype(const char* name, py::handle dtype) {
  throw TypeError(str(name, ": expected a dtype of float16 to float64, bfloat16, int8 to int64, uint8 or ",
                      "bool in the machine's byte order, got ", std::string(py::str(dtype))));
}

// numpy's exact type is everybody's; of its subclasses one has elements that do not count.
bool is_masked(py::handle o) {
  if (Py_TYPE(o.ptr()) == py::detail::npy_api::get().PyArray_Type_) return false;
  const py::object ma = imported("numpy.ma");
  return ma && py::isinstance(o, py::getattr(ma, "MaskedArray"));
}

int64_t as_int(PyObject* o) {
  const long long v = PyLong_AsLongLong(o);
  if (v == -1 && PyErr_Occurred()) throw py::error_already_set();
  return v;
}

void check_dims(Py_ssize_t n, const char* name) {
  PARED_CHECK(n <= Array::kMaxDims, name, ": expected at most ", Array::kMaxDims, " dimensions, got ", n);
}

// Fills `a` where the exchange interface can; otherwise the attributes say what is wrong, or that nothing is.
// Not of subclasses: what those say of themselves counts.
bool exchange_torch(py::handle o, const TorchTypes& torch, Array& a) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(o.ptr()));
  if (!torch.exchange || (type != torch.tensor.ptr() && type != torch.parameter.ptr())) return false;
  DlTensor t;
  if (torch.exchange->tensor_from_object(o.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  const auto* row = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const TypeRow& r) {
    return r.dlpack_kind == t.kind && r.bits == t.bits;
  });
  if (row == std::end(kTypes) || t.lanes != 1 || t.device_type != DlExchange::kCpu ||
      t.ndim > Array::kMaxDims || !t.strides)
    return false;
  a.dtype = row->value;
  a.ndim = t.ndim;
  std::copy_n(t.shape, t.ndim, a.shape);
  std::copy_n(t.strides, t.ndim, a.strides);
  a.data = static_cast<char*>(t.data) + t.byte_offset;
  return t.data || a.size() == 0;
}

TorchNew find_new_tensor(const TorchTypes& torch) {
  TorchNew t;
#if defined(__linux__)
  const auto find = [](const char* library, const char* name) -> void* {
    void* lib = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    return lib ? dlsym(lib, name) : nullptr;
  };
  const auto resolve = [](auto& function, void* symbol) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    return symbol != nullptr;
  };
  // The last is `PyObject* THPVariable_Wrap(const at::TensorBase&)`.
  if (!resolve(t.empty, find("libtorch_cpu.so", "aoti_torch_empty_strided")) ||
      !resolve(t.data, find("libtorch_cpu.so", "aoti_torch_get_data_ptr")) ||
      !resolve(t.release, find("libtorch_cpu.so", "aoti_torch_delete_tensor_object")) ||
      !resolve(t.wrap, find("libtorch_python.so", "_Z16THPVariable_WrapRKN2at10TensorBaseE")))
    return {};
  // Each dtype once, before anybody relies on them.
  const int64_t shape[] = {2, 3};
  for (const TypeRow& row : kTypes) {
    const NewArray made = t(row.torch_number, shape, 2);
    Array a;
    if (!made.object || !exchange_torch(made.object, torch, a) || a.dtype != row.value || a.ndim != 2 ||
        a.shape[0] != 2 || a.shape[1] != 3 || a.strides[0] != 3 || a.strides[1] != 1 || a.data != made.data) {
      PyErr_Clear();
      return {};
    }
  }
#endif
  return t;
}

const TorchTypes* torch_types() {
  static std::atomic<const TorchTypes*> known{nullptr};  // without the GIL two threads may store equal tables
  if (const TorchTypes* types = known.load(std::memory_order_acquire)) return types;
  const py::object torch = imported("torch");
  const auto has = [&](const char* n) { return py::hasattr(torch, n); };
  if (!torch || !has("Tensor") || !has("strided") || !has("is_grad_enabled") || !has("nn") ||
      !py::hasattr(torch.attr("nn"), "Parameter"))
    return nullptr;  // not imported, or still importing
  auto get = [&](const char* n) { return py::getattr(torch, n); };
  auto* t = new TorchTypes{get("Tensor"),
                           get("nn").attr("Parameter"),
                           get("strided"),
                           get("empty"),
                           get("is_grad_enabled"),
                           find_exchange(get("Tensor")),
                           {},
                           {}};
  for (size_t i = 0; i < std::size(kTypes); ++i) t->dtypes[i] = {get(kTypes[i].name), kTypes[i].value};
  t->new_tensor = find_new_tensor(*t);
  known.store(t, std::memory_order_release);
  return t;
}

void refuse_negation(py::handle o, const char* name) {
  // The imaginary part of a conjugate: its memory has the other sign.
  if (call(o, names().is_neg).is(py::handle(Py_True)))
    throw ValueError(
        str(name, ": expected values, got a view whose negation is pending; call .resolve_neg()"));
}

Array parse_torch(py::handle o, const char* name, const TorchTypes& torch) {
  Array a;
  a.name = name, a.tensor = true;
  if (exchange_torch(o, torch, a)) {
    refuse_negation(o, name);
    return a;
  }
  if (!attr(o, names().layout).is(torch.strided))
    throw TypeError(str(name, ": expected a strided (dense) tensor, got layout ",
                        std::string(py::str(attr(o, names().layout)))));
  if (!attr(o, names().is_cpu).is(py::handle(Py_True)))
    throw TypeError(
        str(name, ": expected a CPU tensor, got one on ", std::string(py::str(attr(o, names().device)))));
  const py::object dtype = attr(o, names().dtype);
  bool known = false;
  for (const auto& [object, value] : torch.dtypes)
    if (dtype.is(object)) {
      a.dtype = value;
      known = true;
      break;
    }
  if (!known) refuse_dtype(name, dtype);
  const py::object shape = attr(o, names().shape), stride = call(o, names().stride);
  const Py_ssize_t n = PyTuple_GET_SIZE(shape.ptr());
  check_dims(n, name);
  a.ndim = static_cast<int>(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    a.shape[i] = as_int(PyTuple_GET_ITEM(shape.ptr(), i));
    a.strides[i] = as_int(PyTuple_GET_ITEM(stride.ptr(), i));
  }
  refuse_negation(o, name);
  // Tensors inside torch.func have no pointer and say so; subclasses that wrap other tensors, and those whose
  // storage was freed, have 0.
  PyObject* pointer = PyObject_CallMethodNoArgs(o.ptr(), names().data_ptr.ptr());
  a.data = pointer ? PyLong_AsVoidPtr(pointer) : nullptr;
  Py_XDECREF(pointer);
  PyErr_Clear();
  if (!a.data && a.size() > 0)
    throw TypeError(str(name, ": expected a tensor with memory of its own, got a ", type_name(o), " without",
                        pointer ? "" : ", such as torch.func's vmap and jvp pass"));
  return a;
}

Array parse_numpy(py::handle o, const char* name) {
  if (is_masked(o))
    throw TypeError(str(name, ": expected an array without a mask, got a MaskedArray; call .filled()"));
  const auto array = py::reinterpret_borrow<py::array>(o);
  Array a;
  a.name = name;
  const py::dtype dtype = array.dtype();
  const char kind = dtype.kind();
  const auto size = dtype.itemsize();
  bool known = dtype.byteorder() == '=' || dtype.byteorder() == '|';
  if (kind == 'f' && size == 4) a.dtype = DType::f32;
  else if (kind == 'f' && size == 2) a.dtype = DType::f16;
  else if (kind == 'f' && size == 8) a.dtype = DType::f64;
  else if (kind == 'i' && size == 1) a.dtype = DType::i8;
  else if (kind == 'u' && size == 1) a.dtype = DType::u8;
  else if (kind == 'i' && size == 2) a.dtype = DType::i16;
  else if (kind == 'i' && size == 4) a.dtype = DType::i32;
  else if (kind == 'i' && size == 8) a.dtype = DType::i64;
  else if (kind == 'b') a.dtype = DType::boolean;
  else known = false;
  if (!known) refuse_dtype(name, dtype);
  check_dims(array.ndim(), name);
  a.ndim = static_cast<int>(array.ndim());
  for (int i = 0; i < a.ndim; ++i) {
    a.shape[i] = array.shape(i);
    PARED_CHECK(array.strides(i) % size == 0, name, ": expected strides that are multiples of the item size");
    a.strides[i] = array.strides(i) / size;
  }
  a.data = const_cast<void*>(array.data());
  PARED_CHECK(reinterpret_cast<uintptr_t>(a.data) % size == 0, name, ": expected aligned memory");
  a.writable = array.writeable();
  return a;
}

}  // namespace

int64_t Array::size() const {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

bool Array::contiguous() const {
  if (size() == 0) return true;
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

std::string Array::shape_text() const {
  std::string s = "[";
  for (int i = 0; i < ndim; ++i) s += str(i ? ", " : "", shape[i]);
  return s + "]";
}

const char* Array::copy_hint() const {
  return tensor ? "call .contiguous()" : "call numpy.ascontiguousarray()";
}

bool is_tensor(py::handle object) {
  const TorchTypes* torch = torch_types();
  return torch && is_tensor_of(object, *torch);
}

Array parse_array(py::handle object, const char* name) {
  const TorchTypes* torch = torch_types();
  if (torch && is_tensor_of(object, *torch)) return parse_torch(object, name, *torch);
  if (py::isinstance<py::array>(object)) return parse_numpy(object, name);
  throw TypeError(str(name, ": expected a numpy array or a torch tensor, got ", type_name(object)));
}

NewArray new_array(py::handle like, DType dtype, const int64_t* shape, int ndim) {
  const TorchTypes* torch = torch_types();
  if (!torch || !is_tensor_of(like, *torch)) {
    // numpy has no bfloat16: an array of it was refused when it was parsed.
    py::array a(py::dtype(dtype_name(dtype)), std::vector<py::ssize_t>(shape, shape + ndim));
    void* data = a.mutable_data();
    return {std::move(a), data};
  }
  const auto* row =
      std::find_if(std::begin(kTypes), std::end(kTypes), [&](const TypeRow& r) { return r.value == dtype; });
  if (torch->new_tensor.wrap) {
    NewArray made = torch->new_tensor(row->torch_number, shape, ndim);
    if (made.object) return made;
    PyErr_Clear();  // torch.empty says it in its own words
  }
  py::tuple sizes(ndim);
  for (int i = 0; i < ndim; ++i) sizes[i] = py::int_(shape[i]);
  NewArray made{torch->empty(sizes, py::arg("dtype") = torch->dtypes[row - std::begin(kTypes)].first,
                             py::arg("device") = "cpu"),
                nullptr};
  made.data = parse_array(made.object, "out").data;
  return made;
}

void refuse_grad(std::initializer_list<std::pair<py::handle, const char*>> arrays) {
  const TorchTypes* torch = torch_types();
  if (!torch || torch->grad_enabled().is(py::handle(Py_False))) return;
  for (const auto& [object, name] : arrays)
    if (is_tensor_of(object, *torch) && attr(object, names().requires_grad).is(py::handle(Py_True)))
      throw std::runtime_error(str(name,
                                   ": expected a tensor that needs no gradient, got requires_grad=True; "
                                   "pared's operations are for inference: call under torch.no_grad() or "
                                   "detach()"));
}

// Texts are built when they are needed: a stream each would take half of what a small call costs.
void require_dtype(const Array& a, std::initializer_list<DType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), a.dtype) != allowed.end()) return;
  std::string list;
  for (DType t : allowed) list += str(list.empty() ? "" : " or ", dtype_name(t));
  throw TypeError(str(a.name, ": expected dtype ", list, ", got ", dtype_name(a.dtype)));
}

void require_shape(const Array& a, std::initializer_list<int64_t> expected) {
  const auto fits = [](int64_t want, int64_t size) { return want < 0 || want == size; };
  if (a.ndim == static_cast<int>(expected.size()) &&
      std::equal(expected.begin(), expected.end(), a.shape, fits))
    return;
  std::string text;
  for (int64_t want : expected)
    text += str(text.empty() ? "" : ", ", want < 0 ? std::string("any") : std::to_string(want));
  throw ValueError(str(a.name, ": expected shape [", text, "], got ", a.shape_text()));
}

void require_contiguous(const Array& a) {
  PARED_CHECK(a.contiguous(), a.name, ": expected contiguous memory, got strides that are not; ",
              a.copy_hint());
}

void require_writable(const Array& a) { PARED_CHECK(a.writable, a.name, ": expected writable memory"); }

namespace {
std::pair<uintptr_t, uintptr_t> extent(const Array& a) {
  int64_t lo = 0, hi = 0;
  for (int i = 0; i < a.ndim; ++i) (a.strides[i] < 0 ? lo : hi) += (a.shape[i] - 1) * a.strides[i];
  const auto base = reinterpret_cast<uintptr_t>(a.data);
  const int64_t item = dtype_size(a.dtype);
  return {base + lo * item, base + (hi + 1) * item};
}
}  // namespace

void require_disjoint(const Array& a, const Array& b) {
  if (a.size() == 0 || b.size() == 0) return;
  const auto [a0, a1] = extent(a);
  const auto [b0, b1] = extent(b);
  PARED_CHECK(a1 <= b0 || b1 <= a0, a.name, ": expected memory that does not overlap ", b.name);
}

Rows fold_rows(const Array& a) {
  PARED_CHECK(a.ndim >= 1, a.name, ": expected at least one dimension, got a scalar");
  Rows r{1, a.shape[a.ndim - 1], 0};
  const bool empty = a.size() == 0;
  PARED_CHECK(empty || r.cols == 1 || a.strides[a.ndim - 1] == 1, a.name,
              ": expected the last dimension contiguous, got stride ", a.strides[a.ndim - 1], "; ",
              a.copy_hint());
  r.stride = r.cols;
  bool first = true;
  for (int i = a.ndim - 2; i >= 0; --i) {
    if (!empty && a.shape[i] != 1) {
      PARED_CHECK(first || a.strides[i] == r.stride * r.rows, a.name,
                  ": expected leading dimensions that fold into one, got strides that do not; ",
                  a.copy_hint());
      if (first) r.stride = a.strides[i];
      first = false;
    }
    r.rows *= a.shape[i];
  }
  return r;
}

}  // namespace pared
