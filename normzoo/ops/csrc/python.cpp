// normzoo::standardize as a function of Python. torch.ops reads its arguments by the schema, which takes longer than a
// small norm does. Without Python's headers there is only torch.ops.

#if __has_include(<Python.h>)

#include <torch/csrc/autograd/python_variable.h>

#include "operators.h"

namespace normzoo {
namespace {

const Tensor& tensor(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a tensor, got ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

Maybe maybe(PyObject* object) { return object == Py_None ? Maybe() : Maybe(tensor(object)); }

int64_t integer(PyObject* object) {
  const auto value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

PyObject* standardize(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 17 && PyList_Check(args[10]),
                   "expected the 16 arguments of normzoo::standardize, and whether its first result is all that is wanted");
  static const auto op = find<Standardize>("normzoo::standardize");
  c10::SmallVector<int64_t, 24> axes;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[10]); ++i) axes.push_back(integer(PyList_GET_ITEM(args[10], i)));
  const Tensor& x = tensor(args[0]);
  Maybe optional[9];
  for (int i = 0; i < 9; ++i) optional[i] = maybe(args[1 + i]);
  const auto& [weight, bias, floor, mask, mean, var, running_mean, running_var, batches] = optional;
  const auto channel_dim = integer(args[11]);
  const bool centred = args[12] == Py_True, constant = args[14] == Py_True;
  const double eps = number(args[13]), momentum = number(args[15]);
  auto results = [&] {
    pybind11::gil_scoped_release others_run;
    return op.call(x, weight, bias, floor, mask, mean, var, running_mean, running_var, batches, axes, channel_dim,
                   centred, eps, constant, momentum);
  }();
  if (args[16] == Py_True) return THPVariable_Wrap(std::move(std::get<0>(results)));
  PyObject* tuple = PyTuple_New(4);
  if (!tuple) throw python_error();
  PyTuple_SET_ITEM(tuple, 0, THPVariable_Wrap(std::move(std::get<0>(results))));
  PyTuple_SET_ITEM(tuple, 1, THPVariable_Wrap(std::move(std::get<1>(results))));
  PyTuple_SET_ITEM(tuple, 2, THPVariable_Wrap(std::move(std::get<2>(results))));
  PyTuple_SET_ITEM(tuple, 3, THPVariable_Wrap(std::move(std::get<3>(results))));
  return tuple;
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"standardize", (PyCFunction)(void (*)())standardize, METH_FASTCALL, "normzoo::standardize"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "normzoo_cpu", "normzoo's CPU kernels", -1, functions,
                                 nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace normzoo

PyMODINIT_FUNC PyInit_normzoo_cpu() { return PyModule_Create(&normzoo::module_definition); }

#endif
