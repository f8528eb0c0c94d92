#include "emulate.h"

// 0: warps and their lanes run in their order, each as far as it comes; 1: backwards.
extern "C" __attribute__((visibility("default"))) void arsp_emulate_order(int order) { emulate::device.order = order; }
