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
    bool const text = py::isinstance<py::str>(value);
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (text && value.equal(py::str(names[i]))) return static_cast<int>(i);
      expected += (i ? ", '" : " '") + names[i] + "'";
    }
    if (!text) throw py::type_error(wrong(name, expected, value));
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

char const* pass_of(Kernel const& kernel) { return kernel.forward != nullptr ? "forward" : "backward"; }

Kernel const& kernel_of(Arguments& arguments, std::string const& pass = "") {
  int const index = arguments.small("kernel", 0, static_cast<int>(kernels().size()) - 1);
  Kernel const& kernel = kernels()[index];
  if (!pass.empty() && pass != pass_of(kernel))
    throw py::value_error("kernel: expected one of the " + pass + " pass, got " + std::to_string(index) + ", which is of the " +
                          pass_of(kernel) + " pass");
  return kernel;
}

Pack pack_of(Arguments& arguments, Kernel const& kernel) {
  Pack pack{};
  pack.op = kernel.op, pack.dtype = kernel.dtype, pack.columns = kernel.columns, pack.chunk = kernel.chunk;
  pack.gated = kernel.gated;
  pack.features = arguments.small("features", 1, kernel.columns);
  // Kernels count the elements of a set in an int.
  int const most = INT_MAX / (Images::parts(kernel.op, kernel.gated) * kernel.columns) - kernel.chunk;
  bool const linear = kernel.op == Op::linear;
  int const least = kernel.accumulates ? kernel.columns - kernel.chunk + 1 : linear ? pack.features : 1;
  pack.hidden = arguments.small("hidden", least, kernel.accumulates ? kernel.columns : linear ? pack.features : most);
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

// Takes what every pass is given, but for the tensors. `width` is of a row of all that the kernel has of an iteration.
void take_options(Arguments& arguments, Kernel const& kernel, Pack& pack, Call& call, std::int64_t width) {
  call.features = pack.features, call.hidden = pack.hidden;
  call.iterations = arguments.small("iterations", 1, INT_MAX / 5);
  call.sets = pack.sets = arguments.small("sets", 1, kernel.accumulates ? 1 : call.iterations);
  call.first = arguments.small("first", 0, call.iterations - 1);
  // All that the kernel has of every iteration has an offset in bytes of 63 bits.
  call.rows = arguments.integer("rows", 0, INT64_MAX / 4 / (call.iterations + 1) / width);
  call.cyclic = arguments.choice("order", kOrders) == 1;
  call.norm = Norm(arguments.choice("norm", kNorms));
  pack.norm_float32 = arguments.truth("norm_float32");
  call.activation = Activation(arguments.choice("activation", kActivations));
  if (family(call.activation) != kernel.family)
    throw py::value_error("activation: expected one of the kernel's family, " + name_of(kFamilies, kernel.family) + ", got '" +
                          name_of(kActivations, call.activation) + "', which is of " +
                          name_of(kFamilies, family(call.activation)));
  call.negative_slope = arguments.number("negative_slope", true);
  call.eps = arguments.number("eps", false);
}

void take_tensors(Arguments& arguments, Pack& pack, Call& call) {
  bool const some = call.rows > 0;
  call.x0 = arguments.tensor<void>("x0", call.rows * call.features, 2, false);
  call.coefficients = arguments.tensor<float>("coefficients", 5 * call.iterations, 4, some);
  call.state_scale = arguments.tensor<float>("state_scale", call.iterations, 4, false);
  call.x0_scale = arguments.tensor<float>("x0_scale", call.iterations, 4, false);
  pack.table = arguments.tensor<std::int64_t>("table", std::int64_t(call.sets) * columns_of(pack.op).count, 8, some);
  pack.packed = arguments.tensor<void>("packed", static_cast<std::int64_t>(packed_bytes(pack)), 128, some, true);
  call.packed = pack.packed;
}

// Takes the last arguments; nothing is launched for no rows.
template <class Params>
void launch(Arguments& arguments, Kernel const& kernel, int (*run)(Params const&, int, CUstream_st*), Pack const& pack,
            Params const& params) {
  int const device = arguments.small("device", 0, INT_MAX);
  auto* const stream = reinterpret_cast<CUstream_st*>(arguments.integer("stream", 0, INT64_MAX));
  arguments.finish();
  if (params.rows == 0) return;

  int error;
  {
    py::gil_scoped_release const others_may_run;
    Device const current(device);
    int multiprocessors = 0;
    error = current.error;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = launch_pack(pack, stream);
    if (error == cudaSuccess) error = run(params, multiprocessors, stream);
    if (error != cudaSuccess) cudaGetLastError();  // raised here, so not left for the next call, perhaps torch's, to find
  }
  if (error != cudaSuccess) throw std::runtime_error(message_of(static_cast<cudaError_t>(error), kernel, device));
}

void forward(py::kwargs const& given) {
  Arguments arguments(given);
  Kernel const& kernel = kernel_of(arguments, "forward");
  Pack pack = pack_of(arguments, kernel);
  Forward f{};
  take_options(arguments, kernel, pack, f, pack.features);
  bool const some = f.rows > 0;
  std::int64_t const state = f.rows * f.features;
  f.h = arguments.tensor<void>("h", state, 2, some);
  f.out = arguments.tensor<void>("out", state, 2, some);
  f.states = arguments.tensor<float>("states", (f.iterations + 1 - f.first) * state, 4, false);
  take_tensors(arguments, pack, f);
  launch(arguments, kernel, kernel.forward, pack, f);
}

void backward(py::kwargs const& given) {
  Arguments arguments(given);
  Kernel const& kernel = kernel_of(arguments, "backward");
  Pack pack = pack_of(arguments, kernel);
  Backward b{};
  constexpr int scalars = 7;
  int const wide = kernel.op == Op::linear ? 0 : kernel.gated ? 3 : 2;           // fields of H columns in the ring
  std::int64_t const width = 2 * std::int64_t(pack.features) + wide * std::int64_t(pack.hidden);
  take_options(arguments, kernel, pack, b, width + scalars);
  bool const some = b.rows > 0;
  std::int64_t const most = INT64_MAX / 4 / (b.iterations + 1) / b.features, steps = b.iterations - b.first;
  b.states_rows = arguments.integer("states_rows", b.rows, most);
  b.grad_rows = arguments.integer("grad_rows", b.rows, most);
  std::int64_t const state = b.rows * b.features;
  auto sliced = [&](std::int64_t states, std::int64_t apart) { return some ? (states - 1) * apart * b.features + state : 0; };
  b.states = arguments.tensor<float>("states", sliced(steps, b.states_rows), 4, some, true);
  b.grad_out = arguments.tensor<void>("grad_out", state, 2, some);
  b.grad_states = arguments.tensor<float>("grad_states", sliced(b.iterations + 1, b.grad_rows), 4, false, true);
  b.grad_h = arguments.tensor<void>("grad_h", state, 2, some);
  b.grad_x0 = arguments.tensor<float>("grad_x0", state, 4, false);
  b.scalars = arguments.tensor<float>("scalars", steps * scalars * b.rows, 4, false);
  b.ring = arguments.tensor<void>("ring", steps * b.rows * width, 2, false, true);
  b.blocks = arguments.small("blocks", kernel.accumulates ? 2 : 0, INT_MAX);
  std::int64_t const partials = std::int64_t(b.blocks) * 2 * (kernel.columns + 4) * kernel.columns;
  b.partials = arguments.tensor<float>("partials", partials, 8, some && kernel.accumulates);
  char const* const unwanted = kernel.accumulates ? "ring" : "partials";
  if (kernel.accumulates ? b.ring != nullptr : b.partials != nullptr)
    throw py::value_error(std::string(unwanted) + ": expected None for this kernel, got a tensor");
  take_tensors(arguments, pack, b);
  if (b.grad_x0 != nullptr && b.x0 == nullptr) throw py::value_error("grad_x0: expected None where x0 is None, got a tensor");
  launch(arguments, kernel, kernel.backward, pack, b);
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
    entry["direction"] = pass_of(k);
    entry["op"] = name_of(kOps, k.op), entry["arch"] = k.arch, entry["dtype"] = name_of(kDtypes, k.dtype);
    entry["columns"] = k.columns, entry["gated"] = k.gated, entry["family"] = name_of(kFamilies, k.family);
    entry["chunk"] = k.chunk, entry["rows"] = k.rows, entry["threads"] = k.threads, entry["shared"] = k.shared;
    entry["stages"] = k.stages, entry["accumulates"] = k.accumulates;
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
        "forward(*, kernel, device, stream, rows, features, hidden, iterations, first, sets, order, norm, norm_float32,\n"
        "activation, negative_slope, eps, h, x0, out, states, coefficients, state_scale, x0_scale, table, packed): h_T of all\n"
        "rows into `out`, on the stream, and h_first ... h_T into `states` (T+1-first, rows, D), float32, if that is given.\n"
        "`packed` is scratch, counted in bytes; csrc/params.h says what the others are.");
  m.def("backward", score::backward,
        "backward(*, kernel, device, stream, rows, features, hidden, iterations, first, sets, order, norm, norm_float32,\n"
        "activation, negative_slope, eps, states_rows, grad_rows, states, grad_out, grad_states, grad_h, grad_x0, scalars,\n"
        "ring, blocks, partials, x0, coefficients, state_scale, x0_scale, table, packed): the gradients of these rows, on the\n"
        "stream.\n\n"
        "Read: states, float32, h_first ... h_T-1, `states_rows` rows apart: what `forward` wrote to its `states`. grad_out\n"
        "(rows, D), dL/dh_T. grad_states, float32, dL/dh_0 ... dL/dh_T, `grad_rows` rows apart, or None.\n"
        "Written: grad_h (rows, D), 0 where `first` is not 0. Written where they are not None: grad_x0 (rows, D), float32;\n"
        "scalars (T-first, 7, rows), float32, row by row the gradients of p, q, v, w, e, state_scale and x0_scale, of which v, e\n"
        "and those of scales that are not given are left alone; ring, (T-first) * rows * width elements of 16 bits, where width\n"
        "is 2D for linear, 2D + 2H for mlp, 2D + 3H for gated mlp: score_kernels/triton_kernels/ring.py makes the gradients of\n"
        "the parameters of it. Kernels that accumulate want no ring, but partials, float32, (blocks, 2, columns + 4,\n"
        "columns): each of at most `blocks` blocks, 2 or more, adds its sums to its own. packed is scratch of packed_bytes()\n"
        "of this kernel.");
}
