// Included before each file of csrc/cpu by the compiler's command line: its kernels are then those for the instruction set
// that `tests/host/cpu.cpp` names, instead of the best that the machine has.
#pragma once

#include "../../csrc/cpu/element.h"

namespace mtu_fast::cpu {
extern const Vectors wanted;
}

#define vectors() wanted
