// The products of each instruction set, and which of them this processor takes.
#pragma once
#include "products.h"

namespace fiftyfold {

// The paths that this processor can take, fastest first, ended by null.
const Path* const* supported_paths();

// The path in use: the fastest one, or the one that was chosen.
const Path& current_path();

// Chooses the path with this name; false if the processor has it not.
bool choose_path(const char* name);

}  // namespace fiftyfold
