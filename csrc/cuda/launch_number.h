// What a launch writes beside its number of finished blocks (ticket.h), and how much room that takes.
#pragma once

#include <cstdint>

namespace pared::cuda {

inline constexpr int kTicketCountBits = 24;
inline constexpr int64_t kTicketBytes = 8;

// Another one each time, and one that hardly any other value in memory begins with; its lowest
// kTicketCountBits are zero.
uint64_t launch_number();

}  // namespace pared::cuda
