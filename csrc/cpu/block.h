// Positions of rows as they lie in memory.
#pragma once

#include "element.h"
#include "walk.h"

namespace mtu_fast::cpu {

struct Block {  // [rows, frames, channels, *grid], by strides in elements
  const void* data;
  Element element;
  Sizes size, stride;
};

}  // namespace mtu_fast::cpu
