// A backend around another one that adds up what each operation takes (profile.h): neither the model nor the rooms know
// that they are timed.
#pragma once

#include <memory>

#include "src/backend.h"
#include "src/profile.h"

namespace orpo {

// layers: Config::layers, the number under which the head's bracket begins. profile outlives the backend.
std::unique_ptr<Backend> make_timed_backend(std::unique_ptr<Backend> inner, int layers, Profile& profile);

}  // namespace orpo
