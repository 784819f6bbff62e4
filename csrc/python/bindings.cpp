// The Python module: its functions, the GIL, and which Python error a C++ exception becomes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <new>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "drive/driver.h"
#include "drive/openmp.h"
#include "drive/parallel.h"

namespace py = pybind11;
using namespace fastattn::python;

namespace {

// multiply-adds, a few microseconds: below it, giving up the GIL costs more than it gives
constexpr double tiny_work = 1e5;

struct Interrupted {};  // the Python error is set

unsigned long main_thread;  // the only one in which Python runs handlers of signals

void check_signals() {
  if (PyThread_get_thread_ident() != main_thread) return;
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals()) throw Interrupted();
}

// What is measured: a number of threads that exist, for a time that ends.
void check_measurement(bool plausible, int threads) {
  if (!plausible || threads < 1 || threads > 4096) throw std::invalid_argument("an argument is out of range");
}

// Runs a METH_FASTCALL function of the arguments that `Arguments` lists, without pybind11's argument conversion, which
// would cost more than a tiny call. calculate(bound) may or may not let go of the GIL.
template <class Arguments, class Calculate>
PyObject* call(PyObject* const* args, Py_ssize_t count, const Calculate& calculate) {
  constexpr Py_ssize_t expected = sizeof(Arguments) / sizeof(PyObject*);
  try {
    if (count != expected) throw std::invalid_argument("takes " + std::to_string(expected) + " arguments");
    Arguments arguments;
    memcpy(&arguments, args, sizeof arguments);
    calculate(arguments);
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (Interrupted) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

bool is_tiny(const fastattn::Operands& p) {
  const double pairs = (double)p.batch * p.num_heads * p.seqlen_q * p.seqlen_k;
  return pairs * (p.head_dim + p.head_dim_v) < tiny_work;
}

template <void (*run)(fastattn::Operands&, int)>
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call<ForwardArguments>(args, count, [](const ForwardArguments& arguments) {
    Bound bound(arguments, Extras::terms);
    if (is_tiny(bound.p)) return run(bound.p, 1);
    py::gil_scoped_release release;
    run(bound.p, bound.threads);
  });
}

PyObject* tangent(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call<TangentArguments>(args, count, [](const TangentArguments& arguments) {
    BoundTangent bound(arguments);
    py::gil_scoped_release release;
    fastattn::tangent(bound.p, bound.t, bound.threads);
  });
}

PyObject* statistics(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call<StatisticsArguments>(args, count, [](const StatisticsArguments& arguments) {
    BoundStatistics bound(arguments);
    py::gil_scoped_release release;
    fastattn::statistics(bound.p, bound.t, bound.threads);
  });
}

PyObject* thresholds(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call<ThresholdArguments>(args, count, [](const ThresholdArguments& arguments) {
    BoundThresholds bound(arguments);
    py::gil_scoped_release release;
    fastattn::thresholds(bound.scores, bound.found, bound.rows, bound.keys, (fastattn::Threshold)bound.rule,
                         bound.top_k, bound.threads);
  });
}

PyObject* append(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call<AppendArguments>(args, count, [](const AppendArguments& arguments) {
    BoundAppend bound(arguments);
    py::gil_scoped_release release;
    fastattn::forward(bound.p, bound.sequences, bound.threads);
  });
}

// The same of the other kinds, of which `run` takes the bound call.
template <Extras kind, class Bound, class Arguments, void (*run)(Bound&)>
PyObject* call_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call<Arguments>(args, count, [](const Arguments& arguments) {
    Bound bound(arguments, kind);
    if (is_tiny(bound.p)) return run(bound);
    py::gil_scoped_release release;
    run(bound);
  });
}
template <Extras kind, void (*run)(Bound&)>
constexpr auto forward_of = call_of<kind, Bound, ForwardArguments, run>;
template <Extras kind, void (*run)(BoundBackward&)>
constexpr auto backward_of = call_of<kind, BoundBackward, BackwardArguments, run>;

void dense_backward(BoundBackward& x) { fastattn::backward(x.p, x.g, x.threads); }
void csr_forward(Bound& x) { fastattn::csr_forward(x.p, x.lists, x.threads); }
void csr_backward(BoundBackward& x) { fastattn::csr_backward(x.p, x.g, x.lists, x.threads); }
void sequences_forward(Bound& x) { fastattn::forward(x.p, x.sequences, x.threads); }
void sequences_backward(BoundBackward& x) { fastattn::backward(x.p, x.g, x.sequences, x.threads); }

using Method = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
template <Method method>
std::atomic<int64_t> runs{0};  // without an error

template <Method method>
PyObject* counted(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  PyObject* result = method(self, args, count);
  if (result) runs<method>.fetch_add(1, std::memory_order_relaxed);
  return result;
}

PyMethodDef fast_methods[] = {
    {"shapes", (PyCFunction)(void (*)())shapes, METH_FASTCALL,
     "shapes(*tensors) -> dtypes and sizes of up to 16 tensors, ints and Nones as a key, or None where one is not a "
     "plain CPU tensor."},
    {"signature", (PyCFunction)(void (*)())signature, METH_FASTCALL,
     "signature(q, k, v, *extras) -> (key, (batch, seqlen_q, seqlen_k)), or None where a tensor is not a plain CPU "
     "tensor "
     "or where batch or seqlen_k differ. The key holds the dtypes, the other sizes of q, k and v, and of each of up to "
     "8 "
     "extras (a tensor or None) its rank and which of its sizes equal 1, batch, num_heads, seqlen_q, seqlen_k or "
     "seqlen_q + seqlen_k - 1."},
    {"forward", (PyCFunction)(void (*)())counted<forward<fastattn::forward>>, METH_FASTCALL,
     "forward(q, k, v, out, lse, lse_parts, out_exact, terms, threads): fills out, and those of lse, lse_parts and "
     "out_exact that are not None."},
    {"decode", (PyCFunction)(void (*)())counted<forward<fastattn::decode>>, METH_FASTCALL,
     "decode(...): as forward, for few query rows a key head; takes no block_mask."},
    {"backward", (PyCFunction)(void (*)())counted<backward_of<Extras::terms, dense_backward>>, METH_FASTCALL,
     "backward(q, k, v, out, lse_parts, terms, dout, dlse, dq, dk, dv, grads, threads): out in the compute dtype. "
     "Fills "
     "those of dq, dk, dv that are not None, adds to the gradients in grads, a Terms."},
    {"tangent", (PyCFunction)(void (*)())counted<tangent>, METH_FASTCALL,
     "tangent(q, k, v, terms, tq, tk, tv, tterms, tout, tlse, threads): fills tout, and tlse if it is not None. Of the "
     "tangents tq, tk, tv and those in tterms, a Terms, None is zero."},
    {"statistics", (PyCFunction)(void (*)())counted<statistics>, METH_FASTCALL,
     "statistics(q, k, lse_parts, terms, key_mass, entropy, distance, max, threads): fills those of the last four that "
     "are not None."},
    {"thresholds", (PyCFunction)(void (*)())counted<thresholds>, METH_FASTCALL,
     "thresholds(scores, found, rule, top_k, threads): fills found [rows] from scores [rows, keys], both contiguous, "
     "float32 or float64. rule 0: the top_k-th largest, 1: tau of sparsemax, 2: tau of entmax-1.5."},
    {"csr_forward", (PyCFunction)(void (*)())counted<forward_of<Extras::edges, csr_forward>>, METH_FASTCALL,
     "csr_forward(q, k, v, out, lse, lse_parts, out_exact, edges, threads): as forward, with an Edges."},
    {"csr_backward", (PyCFunction)(void (*)())counted<backward_of<Extras::edges, csr_backward>>, METH_FASTCALL,
     "csr_backward(q, k, v, out, lse_parts, edges, dout, dlse, dq, dk, dv, grads, threads): as backward, with two "
     "Edges."},
    {"sequences_forward", (PyCFunction)(void (*)())counted<forward_of<Extras::sequences, sequences_forward>>,
     METH_FASTCALL,
     "sequences_forward(q, k, v, out, lse, lse_parts, out_exact, sequences, threads): as forward, with a Sequences; "
     "appends to the caches first what it holds."},
    {"sequences_backward", (PyCFunction)(void (*)())counted<backward_of<Extras::sequences, sequences_backward>>,
     METH_FASTCALL,
     "sequences_backward(q, k, v, out, lse_parts, sequences, dout, dlse, dq, dk, dv, grads, threads): as backward, "
     "with "
     "two Sequences, of packed rows alone. Rows that belong to no sequence are left as they are."},
    {"append", (PyCFunction)(void (*)())counted<append>, METH_FASTCALL,
     "append(k_cache, v_cache, sequences, threads): writes the new rows alone."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastattn's compiled CPU kernels.";
  PyModule_AddFunctions(m.ptr(), fast_methods);
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  fastattn::check_often(check_signals);
  m.def("bind_fields", bind_fields, py::arg("kind"), py::arg("fields"),
        "Names the fields of Terms or Edges in their order, once, before a function gets one.");
  m.attr("few_rows") = fastattn::few_rows;
  m.def(
      "runs",
      [] {
        return std::map<std::string, int64_t>{
            {"forward", runs<forward<fastattn::forward>>},
            {"decode", runs<forward<fastattn::decode>>},
            {"backward", runs<backward_of<Extras::terms, dense_backward>>},
            {"tangent", runs<tangent>},
            {"thresholds", runs<thresholds>},
            {"csr_forward", runs<forward_of<Extras::edges, csr_forward>>},
            {"csr_backward", runs<backward_of<Extras::edges, csr_backward>>},
            {"sequences_forward", runs<forward_of<Extras::sequences, sequences_forward>>},
            {"sequences_backward", runs<backward_of<Extras::sequences, sequences_backward>>},
            {"append", runs<append>}};
      },
      "How often each kernel has run in this process, by the name of its function here.");
  m.def("built_isas", fastattn::built_names, "The instruction sets that this build has kernels for, best first.");
  m.def("isa", [] { return fastattn::instruction_set().name; }, "The instruction set that the kernels run on.");
  m.def(
      "pair_isa",
      [] {
        const char* name = fastattn::instruction_set().with_pairs;
        return std::string(name ? name : "");
      },
      "The same where products are of pairs of bfloat16; empty if none are.");
  m.def("openmp", fastattn::openmp_library,
        "The file of the OpenMP runtime that calls run on, torch's; empty if there is none, and calls run on one "
        "thread.");
  m.def("release_scratch", fastattn::release_scratch, py::call_guard<py::gil_scoped_release>(),
        "Frees the memory that this thread and its OpenMP threads keep for their next call; returns its bytes.");
  m.def("skipped_pairs", fastattn::skipped_pairs,
        "How many (query, key) pairs the calls of this process have skipped because their weights are 0.");
  m.def(
      "fma_rate",
      [](const std::string& dtype, double seconds, int threads) {
        const fastattn::DType type = dtype_of(dtype);
        check_measurement(seconds >= 0 && seconds <= 60, threads);
        py::gil_scoped_release release;
        return fastattn::fma_rate(type, seconds, threads);
      },
      py::arg("dtype"), py::arg("seconds"), py::arg("threads"),
      "Peak multiply-add rate of `threads` threads together, in FLOP/s, measured on registers for `seconds`.");
  m.def(
      "read_rate",
      [](int64_t bytes, int passes, int threads) {
        check_measurement(bytes >= 0 && passes >= 1, threads);
        py::gil_scoped_release release;
        return fastattn::read_rate(bytes, passes, threads);
      },
      py::arg("bytes"), py::arg("passes"), py::arg("threads"),
      "Bytes/s at which `threads` threads together read `bytes` bytes by plain loads in address order, best of "
      "`passes`.");
}
