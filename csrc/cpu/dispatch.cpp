// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "csrc/cpu/kernels.h"

#ifdef GAPLESS_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gapless::cpu {

#define GAPLESS_TABLE(ISA)                                                                                   \
    namespace ISA {                                                                                          \
    PackedSize packed_size(const VarlenParams&, int64_t);                                                    \
    void varlen_forward(const VarlenParams&, const ForwardItem&);                                            \
    void varlen_merge(const VarlenParams&, const MergeItem&);                                                \
    void block_mass(const VarlenParams&, const ForwardItem&);                                                \
    void varlen_delta(const VarlenBackwardParams&, int64_t, int64_t);                                        \
    void varlen_backward(const VarlenBackwardParams&, const BackwardItem&, const BackwardItem*);             \
    BackwardSpace backward_space(const VarlenParams&, int64_t);                                              \
    int64_t expert_panel_bytes(const ExpertParams&, const ExpertItem&);                                      \
    void expert_up(const ExpertParams&, const ExpertItem&, char*);                                           \
    void expert_down(const ExpertParams&, const ExpertItem&, char*);                                         \
    void grouped_mm(const GroupedParams&, const ExpertItem&);                                                \
    int64_t expert_dpre_bytes(const ExpertParams&, const ExpertItem&);                                       \
    void expert_backward_up(const ExpertParams&, const ExpertItem&, char*);                                  \
    void expert_backward_down(const ExpertParams&, const ExpertItem&, char*);                                \
    void grouped_outer(const OuterParams&, const ExpertItem&);                                               \
    void expert_sum_rows(const OuterParams&, const ExpertItem&);                                             \
    void expert_gather(const PairRowsParams&, int64_t, int64_t);                                             \
    void expert_combine(const PairRowsParams&, int64_t, int64_t);                                            \
    void expert_dot(const PairRowsParams&, int64_t, int64_t);                                                \
    void softmax_sums(const CrossEntropyParams&, int64_t, int64_t);                                          \
    void softmax_gradient(const CrossEntropyParams&, int64_t, int64_t);                                      \
    Kernels table() {                                                                                        \
        return {#ISA,          packed_size,     varlen_forward,    varlen_merge,       block_mass,           \
                varlen_delta,  varlen_backward, backward_space,    expert_panel_bytes, expert_up,            \
                expert_down,   grouped_mm,      expert_dpre_bytes, expert_backward_up, expert_backward_down, \
                grouped_outer, expert_sum_rows, expert_gather,     expert_combine,     expert_dot,           \
                softmax_sums,  softmax_gradient};                                                            \
    }                                                                                                        \
    }

GAPLESS_TABLE(baseline)
#ifdef GAPLESS_HAVE_AVX2
GAPLESS_TABLE(avx2)
#endif
#ifdef GAPLESS_HAVE_AVX512
GAPLESS_TABLE(avx512)
#endif
#ifdef GAPLESS_HAVE_AVX512_BF16
GAPLESS_TABLE(avx512_bf16)
#endif
#ifdef GAPLESS_HAVE_AMX
GAPLESS_TABLE(amx)
#endif

namespace {

enum Level { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

/// Tile registers exist, and the kernel lets this process use them (it wants to be asked, once).
bool amx_usable() {
#ifdef GAPLESS_HAVE_AMX
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    const bool tiles = (d >> 24 & 1) && (d >> 22 & 1);
    asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
    const bool bf16 = a >> 5 & 1;
    return tiles && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Level machine_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const auto has = [](bool f, bool b, bool d, bool v) { return f && b && d && v; };
    const bool avx512 = has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                            __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"));
    const bool avx2 = has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("bmi2"),
                          __builtin_cpu_supports("fma"), __builtin_cpu_supports("f16c"));
    if (avx512 && avx2 && amx_usable()) return kAmx;
    if (avx512 && avx2) return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
    if (avx2) return kAvx2;
#endif
    return kBaseline;
}

Level capped(Level level) {
    const auto cap = [&](const char* variable, std::initializer_list<const char*> names) {
        const char* value = std::getenv(variable);
        if (!value || !*value) return;
        int at = 0;
        for (const char* name : names) {
            if (std::strcmp(value, name) == 0) {
                if (at < level) level = static_cast<Level>(at);
                return;
            }
            ++at;
        }
        if (std::strcmp(variable, "GAPLESS_ISA") == 0)
            throw std::runtime_error(std::string("GAPLESS_ISA is \"") + value +
                                     "\": it has to be baseline, avx2, avx512, avx512_bf16 or amx");
    };
    cap("GAPLESS_ISA", {"baseline", "avx2", "avx512", "avx512_bf16", "amx"});
    cap("ATEN_CPU_CAPABILITY", {"default", "avx2", "avx512"});
    return level;
}

struct Table {
    Level needs;
    Kernels (*make)();
};

/// The tables of this build, best first; the last runs on any machine.
constexpr Table kTables[] = {
#ifdef GAPLESS_HAVE_AMX
    {kAmx, amx::table},
#endif
#ifdef GAPLESS_HAVE_AVX512_BF16
    {kAvx512Bf16, avx512_bf16::table},
#endif
#ifdef GAPLESS_HAVE_AVX512
    {kAvx512, avx512::table},
#endif
#ifdef GAPLESS_HAVE_AVX2
    {kAvx2, avx2::table},
#endif
    {kBaseline, baseline::table},
};

Kernels choose() {
    const Level level = capped(machine_level());
    const Table* table = kTables;
    while (table->needs > level) ++table;
    return table->make();
}

}  // namespace

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

}  // namespace gapless::cpu
