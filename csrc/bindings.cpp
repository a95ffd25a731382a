// The module score_kernels._cuda: the only file that knows Python, and it knows nothing of torch. A tensor comes as (address,
// number of elements), or None. Every argument is checked before anything is launched; what is wrong raises, and the error says
// which argument it is, what was expected and what came.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>
#include <cmath>
#include <string>
#include <vector>

#include "kernels.h"
#include "weights.cuh"

namespace py = pybind11;

namespace score {
namespace {

// Of the enumerations, in their order.
using Names = std::vector<std::string>;
Names const kOps{"linear", "mlp"};
Names const kDtypes{"float16", "bfloat16"};
Names const kNorms{"none", "layernorm", "rmsnorm"};
Names const kOrders{"consecutive", "cyclic"};
Names const kActivations{"identity", "relu", "relu2", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"};
Names const kFamilies{"relu", "piecewise", "gelu", "sigmoidal"};

template <class E>
std::string const& name_of(Names const& names, E value) {
  return names[static_cast<int>(value)];
}

// The keyword arguments of a call, each taken once.
class Arguments {
 public:
  explicit Arguments(py::kwargs const& given) : given_(given) {}

  std::int64_t integer(char const* name, std::int64_t low, std::int64_t high) { return integer(name, take(name), low, high); }
  int small(char const* name, int low, int high) { return static_cast<int>(integer(name, low, high)); }

  float number(char const* name, bool negative) {
    py::object const value = take(name);
    float const x = static_cast<float>(PyFloat_AsDouble(value.ptr()));
    if (PyErr_Occurred()) {
      PyErr_Clear();
      throw py::type_error(wrong(name, "a number", value));
    }
    if (!std::isfinite(x) || (x < 0 && !negative))
      throw py::value_error(wrong(name, negative ? "a finite number" : "a finite number of at least 0", value));
    return x;
  }

  bool truth(char const* name) {
    py::object const value = take(name);
    if (!PyBool_Check(value.ptr())) throw py::type_error(wrong(name, "True or False", value));
    return value.ptr() == Py_True;
  }

  int choice(char const* name, Names const& names) {
    py::object const value = take(name);
    std::string expected = "one of";
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (value.equal(py::str(names[i]))) return static_cast<int>(i);
      expected += (i ? ", '" : " '") + names[i] + "'";
    }
    if (!py::isinstance<py::str>(value)) throw py::type_error(wrong(name, expected, value));
    throw py::value_error(wrong(name, expected, value));
  }

  // A tensor of `count` elements (or more, if it is `at_least`), aligned to `alignment` bytes.
  template <class T>
  T* tensor(char const* name, std::int64_t count, int alignment, bool required, bool at_least = false) {
    py::object const value = take(name);
    if (value.is_none() && !required) return nullptr;
    std::string const expected = "(address, elements) with " + std::string(at_least ? "at least " : "") +
                                 std::to_string(count) + " elements and an address that is not 0 and a multiple of " +
                                 std::to_string(alignment);
    if (!py::isinstance<py::tuple>(value) || py::len(value) != 2) throw py::type_error(wrong(name, expected, value));
    py::tuple const pair = value;
    std::int64_t const address = integer(name, pair[0], 0, INT64_MAX), elements = integer(name, pair[1], 0, INT64_MAX);
    bool const counted = at_least ? elements >= count : elements == count;
    bool const placed = address % alignment == 0 && (address != 0 || count == 0);
    if (!counted || !placed) throw py::value_error(wrong(name, expected, value));
    return reinterpret_cast<T*>(address);
  }

  void finish() const {
    if (given_.empty()) return;
    throw py::type_error(py::str(given_.begin()->first).cast<std::string>() + ": there is no such argument");
  }

 private:
  py::object take(char const* name) {
    if (!given_.contains(name)) throw py::type_error(std::string(name) + ": the argument is missing");
    return given_.attr("pop")(name);
  }

  static std::int64_t integer(char const* name, py::object const& value, std::int64_t low, std::int64_t high) {
    std::string const expected = "an integer from " + std::to_string(low) + " to " + std::to_string(high);
    auto const index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!index) {
      PyErr_Clear();
      throw py::type_error(wrong(name, expected, value));
    }
    int overflow = 0;
    std::int64_t const n = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0 || n < low || n > high) throw py::value_error(wrong(name, expected, value));
    return n;
  }

  static std::string wrong(char const* name, std::string const& expected, py::handle value) {
    return std::string(name) + ": expected " + expected + ", got " + py::repr(value).cast<std::string>();
  }

  py::dict given_;
};

Kernel const& kernel_of(Arguments& arguments) {
  return kernels()[arguments.small("kernel", 0, static_cast<int>(kernels().size()) - 1)];
}

Pack pack_of(Arguments& arguments, Kernel const& kernel) {
  Pack pack{};
  pack.op = kernel.op, pack.dtype = kernel.dtype, pack.columns = kernel.columns, pack.chunk = kernel.chunk;
  pack.gated = kernel.gated;
  pack.features = arguments.small("features", 1, kernel.columns);
  // Kernels count the elements of a set in an int.
  int const most = INT_MAX / (Images::parts(kernel.op, kernel.gated) * kernel.columns) - kernel.chunk;
  bool const linear = kernel.op == Op::linear;
  pack.hidden = arguments.small("hidden", linear ? pack.features : 1, linear ? pack.features : most);
  return pack;
}

// Makes `device` current until the end of the scope.
class Device {
 public:
  explicit Device(int device) : error(cudaGetDevice(&before_)) {
    if (error == cudaSuccess) error = cudaSetDevice(device);
  }
  Device(Device const&) = delete;
  ~Device() {
    if (error == cudaSuccess) cudaSetDevice(before_);
  }
  cudaError_t error;

 private:
  int before_ = 0;
};

std::string message_of(cudaError_t error, Kernel const& kernel, int device) {
  std::string message = std::string("CUDA: ") + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    message += "; device " + std::to_string(device) + " wants sm_" + std::to_string(10 * major + minor) +
               ", the kernel asked for is of sm_" + std::to_string(kernel.arch) + ", and what was built is " SCORE_ARCHITECTURES
               "; TORCH_CUDA_ARCH_LIST chooses when the package is built";
  }
  return message;
}

int launch(Kernel const& kernel, Pack const& pack, Forward const& forward, int device, CUstream_st* stream) {
  Device const current(device);
  int multiprocessors = 0;
  int error = current.error;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = launch_pack(pack, stream);
  if (error == cudaSuccess) error = kernel.launch(forward, multiprocessors, stream);
  if (error != cudaSuccess) cudaGetLastError();  // raised here, so not left for the next call, perhaps torch's, to find
  return error;
}

void forward(py::kwargs const& given) {
  Arguments arguments(given);
  Kernel const& kernel = kernel_of(arguments);
  Pack pack = pack_of(arguments, kernel);
  Forward f{};
  f.features = pack.features, f.hidden = pack.hidden;
  f.iterations = arguments.small("iterations", 1, INT_MAX / 5);
  f.sets = pack.sets = arguments.small("sets", 1, f.iterations);
  // Every state of every iteration has an offset in bytes of 63 bits.
  f.rows = arguments.integer("rows", 0, INT64_MAX / 4 / (f.iterations + 1) / f.features);
  f.cyclic = arguments.choice("order", kOrders) == 1;
  f.norm = Norm(arguments.choice("norm", kNorms));
  pack.norm_float32 = arguments.truth("norm_float32");
  f.activation = Activation(arguments.choice("activation", kActivations));
  if (family(f.activation) != kernel.family)
    throw py::value_error("activation: expected one of the kernel's family, " + name_of(kFamilies, kernel.family) + ", got '" +
                          name_of(kActivations, f.activation) + "', which is of " + name_of(kFamilies, family(f.activation)));
  f.negative_slope = arguments.number("negative_slope", true);
  f.eps = arguments.number("eps", false);

  bool const some = f.rows > 0;
  std::int64_t const state = f.rows * f.features;
  f.h = arguments.tensor<void>("h", state, 2, some);
  f.x0 = arguments.tensor<void>("x0", state, 2, false);
  f.out = arguments.tensor<void>("out", state, 2, some);
  f.states = arguments.tensor<float>("states", (f.iterations + 1) * state, 4, false);
  f.coefficients = arguments.tensor<float>("coefficients", 5 * f.iterations, 4, some);
  f.state_scale = arguments.tensor<float>("state_scale", f.iterations, 4, false);
  f.x0_scale = arguments.tensor<float>("x0_scale", f.iterations, 4, false);
  pack.table = arguments.tensor<std::int64_t>("table", std::int64_t(f.sets) * columns_of(kernel.op).count, 8, some);
  pack.packed = arguments.tensor<void>("packed", static_cast<std::int64_t>(packed_bytes(pack)), 128, some, true);
  f.packed = pack.packed;
  int const device = arguments.small("device", 0, INT_MAX);
  auto* const stream = reinterpret_cast<CUstream_st*>(arguments.integer("stream", 0, INT64_MAX));
  arguments.finish();
  if (!some) return;

  int error;
  {
    py::gil_scoped_release const others_may_run;
    error = launch(kernel, pack, f, device, stream);
  }
  if (error != cudaSuccess) throw std::runtime_error(message_of(static_cast<cudaError_t>(error), kernel, device));
}

std::size_t scratch(py::kwargs const& given) {
  Arguments arguments(given);
  Pack pack = pack_of(arguments, kernel_of(arguments));
  pack.sets = arguments.small("sets", 1, INT_MAX);
  arguments.finish();
  return packed_bytes(pack);
}

py::object architectures() { return py::str(SCORE_ARCHITECTURES).attr("split")(); }

std::string family_of(py::kwargs const& given) {
  Arguments arguments(given);
  auto const activation = Activation(arguments.choice("activation", kActivations));
  arguments.finish();
  return name_of(kFamilies, family(activation));
}

py::list listed() {
  py::list all;
  for (Kernel const& k : kernels()) {
    py::dict entry;
    entry["op"] = name_of(kOps, k.op), entry["arch"] = k.arch, entry["dtype"] = name_of(kDtypes, k.dtype);
    entry["columns"] = k.columns, entry["gated"] = k.gated, entry["family"] = name_of(kFamilies, k.family);
    entry["chunk"] = k.chunk, entry["rows"] = k.rows, entry["threads"] = k.threads, entry["shared"] = k.shared;
    entry["stages"] = k.stages;
    all.append(entry);
  }
  return all;
}

}  // namespace
}  // namespace score

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels. All arguments are keywords; a tensor is (address, number of elements), or None.";
  m.def("architectures", score::architectures,
        "What was compiled: binaries sm_NN, and PTX compute_NN, which a driver compiles for newer GPUs.");
  m.def("kernels", score::listed, "The kernels, as dicts; `kernel` of the other functions is an index of this list.");
  m.def("family", score::family_of, "family(*, activation): the family of kernels that has it.");
  m.def("packed_bytes", score::scratch, "packed_bytes(*, kernel, features, hidden, sets): the size of `packed`.");
  m.def("forward", score::forward,
        "forward(*, kernel, device, stream, rows, features, hidden, iterations, sets, order, norm, norm_float32, activation,\n"
        "negative_slope, eps, h, x0, out, states, coefficients, state_scale, x0_scale, table, packed): h_T of all rows into\n"
        "`out`, on the stream. `packed` is scratch, counted in bytes; csrc/params.h says what the others are.");
}
