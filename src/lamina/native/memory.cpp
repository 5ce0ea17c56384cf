/* Where torch's large tensors on a CPU lie: one range of addresses, reserved once and made usable from its start as it is needed.

   The system fills fresh memory with zeros, at a few gigabytes a second, and torch takes its memory fresh for every tensor:
   a tenth of a training step. Here what was freed serves the next tensor. A tensor gets the first hole that holds it, and
   neighbouring holes are one; a step frees what it keeps in the reverse order of its making, so that holes do not last. (glibc's
   heap can keep freed memory too, but small things settle between its tensors, and a hole never holds an aligned tensor
   of its own size.) Small tensors stay where torch puts them. */
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t SMALL = 1 << 16, GROWTH = 1 << 25, HUGE_PAGE = 1 << 21;
const size_t PAGE = sysconf(_SC_PAGESIZE); /* a whole number of them for each tensor: what is handed back is whole pages */

size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

class Arena final : public c10::Allocator {
    std::mutex busy;
    char *start = nullptr, *usable = nullptr, *end = nullptr; /* of the range, of what is not usable yet, of all */
    std::map<char *, size_t> holes;
    std::unordered_map<char *, size_t> taken;

    char *take(size_t size) {
        std::lock_guard<std::mutex> alone(busy);
        auto hole = holes.begin();
        while (hole != holes.end() && hole->second < size) ++hole;
        if (hole == holes.end() && (hole = grown(size)) == holes.end()) return nullptr;
        auto [at, room] = *hole;
        holes.erase(hole);
        if (room > size) holes[at + size] = room - size;
        taken[at] = size;
        return at;
    }

    std::map<char *, size_t>::iterator grown(size_t size) {
        size_t last = holes.empty() || holes.rbegin()->first + holes.rbegin()->second != usable ? 0 : holes.rbegin()->second;
        size_t more = up(size - last, GROWTH);
        if (more > size_t(end - usable) || mprotect(usable, more, PROT_READ | PROT_WRITE)) return holes.end();
        char *at = usable - last;
        usable += more;
        holes[at] = last + more;
        return holes.find(at);
    }

    bool give_back(char *at) {
        if (at < start || at >= end) return false;
        std::lock_guard<std::mutex> alone(busy);
        auto found = taken.find(at);
        size_t size = found->second;
        taken.erase(found);
        auto after = holes.lower_bound(at);
        if (after != holes.end() && after->first == at + size) {
            size += after->second;
            after = holes.erase(after);
        }
        if (after != holes.begin() && std::prev(after)->first + std::prev(after)->second == at) std::prev(after)->second += size;
        else holes[at] = size;
        return true;
    }

    static void release(void *data);

public:
    bool reserve(size_t size) {
        if (start) return true;
        void *range = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) return false;
        madvise(range, size, MADV_HUGEPAGE);
        usable = reinterpret_cast<char *>(up(reinterpret_cast<size_t>(range), HUGE_PAGE));
        start = usable, end = static_cast<char *>(range) + size;
        return true;
    }

    void hold() { busy.lock(); }
    void let_go() { busy.unlock(); }

    void trim() {
        std::lock_guard<std::mutex> alone(busy);
        for (auto [at, size] : holes) madvise(at, size, MADV_DONTNEED);
    }

    c10::DataPtr allocate(size_t size) override {
        void *data = size < SMALL ? nullptr : take(up(size, PAGE));
        if (!data) data = c10::alloc_cpu(size); /* it also says what is wrong where there is no memory */
        c10::profiledCPUMemoryReporter().New(data, size);
        return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void *to, const void *from, size_t size) const override { std::memcpy(to, from, size); }
};

Arena &arena() {
    static auto *one = new Arena; /* never deleted: tensors are freed until the very end of the process */
    return *one;
}

void Arena::release(void *data) {
    if (!data) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    if (!arena().give_back(static_cast<char *>(data))) c10::free_cpu(data);
}

} // namespace

/* Whether `size` bytes of addresses could be had, and torch's tensors lie there from now on. */
extern "C" int use_arena(size_t size) {
    if (!arena().reserve(size)) return 0;
    /* A process that is forked while another thread allocates must not inherit a lock that nobody will open. */
    pthread_atfork([] { arena().hold(); }, [] { arena().let_go(); }, [] { arena().let_go(); });
    c10::SetCPUAllocator(&arena(), 1);
    return 1;
}

/* Hands what is free back to the system. */
extern "C" void trim_arena() { arena().trim(); }
