// Numbers in memory whose type is known when a kernel runs.

#pragma once

#include <c10/util/BFloat16.h>

// float32 or bfloat16: at most one of them is not null.
struct Numbers {
  const float* wide;
  const c10::BFloat16* narrow;
  explicit operator bool() const { return wide || narrow; }
};
