// The Python module: importing it loads the shared library, whose static initialisers register the
// kernels.
#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}

extern "C" __attribute__((visibility("default"))) const char* edt_cuda_sources() {
  return EDT_SOURCES;
}
