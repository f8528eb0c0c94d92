#include "device.cuh"

// What a launcher's result other than 0 means.
ARSP_EXPORT const char* arsp_error_string(int status) { return error_string(status); }
