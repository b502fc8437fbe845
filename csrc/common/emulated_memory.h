// The emulated machine's shared memory, and copies into it that land later.
#pragma once

#include "emulated_machine.h"

namespace ssl_ib::emulator {

// ---- Shared memory ----

// Unset shared memory with an unset guard behind it; returns the offset, a multiple of 1024.
inline size_t allocate_shared(const void* key, size_t bytes) {
    const size_t begin = (machine.shared_end + 1023) / 1024 * 1024, end = begin + bytes;
    size_t total = bytes;
    for (const Allocation& a : machine.allocations) total += a.end - a.begin;
    if (total > kMaxShared) fail(std::to_string(total) + " bytes of shared memory");
    if (machine.allocations.size() == kMaxAllocations) fail("too many allocations of shared memory");
    machine.allocations.push_back({key, begin, end});
    machine.shared_end = end + kGuard;
    for (size_t i = begin; i < machine.shared_end; i += 2) std::memcpy(machine.shared + i, &kUnset, 2);
    return begin;
}

// The block's static variable that `key` stands for.
inline void* static_shared(const void* key, size_t bytes) {
    for (const Allocation& a : machine.allocations) {
        if (a.key == key) return machine.shared + a.begin;
    }
    return machine.shared + allocate_shared(key, bytes);
}

inline void check_guards() {
    for (const Allocation& a : machine.allocations) {
        for (size_t i = a.end; i < a.end + kGuard; ++i) {
            if (machine.shared[i] != static_cast<unsigned char>((i - a.begin) % 2 ? kUnset >> 8 : kUnset)) {
                fail("a write " + std::to_string(i - a.end) + " bytes past the end of " +
                     std::to_string(a.end - a.begin) + " bytes of shared memory");
            }
        }
    }
}

// ---- Asynchronous copies, grouped as cp.async's ----

inline void perform(const Copy& copy) {
    std::memcpy(copy.to, copy.from, copy.valid_bytes);
    std::memset(static_cast<char*>(copy.to) + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
}

// Copies valid_bytes of the `bytes`; zeros follow.
inline void copy_async(void* to, const void* from, unsigned bytes, unsigned valid_bytes) {
    const Copy copy{to, from, bytes, valid_bytes, machine.current->copy_group};
    if (reinterpret_cast<uintptr_t>(to) % bytes || (valid_bytes && reinterpret_cast<uintptr_t>(from) % bytes)) {
        fail("an asynchronous copy of " + std::to_string(bytes) + " bytes that is not aligned to them");
    }
    if (machine.order == Order::reverse) return perform(copy);
    machine.current->copies.push_back(copy);
}

inline void commit_copies() { ++machine.current->copy_group; }

// Waits for all groups that were committed but the last `pending`.
inline void wait_for_copies(unsigned pending) {
    Thread& self = *machine.current;
    std::erase_if(self.copies, [&](const Copy& copy) {
        const bool due = copy.group + pending < self.copy_group;
        if (due) perform(copy);
        return due;
    });
}

}  // namespace ssl_ib::emulator
