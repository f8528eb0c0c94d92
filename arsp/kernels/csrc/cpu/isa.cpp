#include "isa.h"

// Uses an instruction set no better than the processor's (negative: the best one); returns the one in use.
extern "C" int arsp_use_isa(int wanted) {
  isa = wanted < 0 ? best_isa : static_cast<Isa>(std::min<int>(wanted, best_isa));
  return isa;
}
