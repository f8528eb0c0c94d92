// What a thread has to be given to be worth its waking.

#pragma once

#include <strings.h>

#include <cstdint>
#include <cstdlib>

// Least work for a thread, given what is worth one that spins between two calls. With OMP_WAIT_POLICY=PASSIVE threads sleep instead, and
// waking one takes tens of microseconds, as long as it takes to read one or two megabytes: then ``asleep`` times as much.
inline int64_t worth_a_thread(int64_t spinning, int64_t asleep = 64) {
  static const bool sleeps = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy && strcasecmp(policy, "passive") == 0;
  }();
  return sleeps ? asleep * spinning : spinning;
}
