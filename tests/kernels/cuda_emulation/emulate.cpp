#include "emulate.h"

// 0: threads run in their order, 1: backwards, 2: scattered.
extern "C" __attribute__((visibility("default"))) void arsp_emulate_order(int order) { emulate::device.order = order; }
