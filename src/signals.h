// A run is stopped politely: SIGTERM, SIGINT and SIGUSR1 set a flag that training and evaluation look at between
// micro-batches and steps.
#pragma once

#include <cstdint>

namespace orpo {

// From here on the three signals ask for a stop instead of ending the process; a second SIGINT ends it.
void catch_stop_signals();
// Asks for a stop when the process has run this long. 0: never.
void stop_after(int64_t seconds);

// Whether a stop has been asked for.
bool stop_requested();
// Why, for the log: "SIGTERM", "--stop-after-seconds".
const char* stop_reason();

}  // namespace orpo
