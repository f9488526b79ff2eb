/* Instruction sets of an x86 CPU hidden from a process and its children, at the CPU's own speed.

   Preloaded into a program on Linux. The kernel makes `cpuid` fault (arch_prctl(2), ARCH_CPUID); the
   handler executes it and clears the bits that HIDE_CPUID lists: "leaf:subleaf:register:mask", in hex,
   apart by commas, registers 0 to 3 for eax, ebx, ecx, edx. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, RULES = 64 };

typedef int (*Sigaction)(int, const struct sigaction *, struct sigaction *);

static struct Rule { unsigned leaf, subleaf, place, mask; } rules[RULES];
static int count;
static struct sigaction theirs; /* the program's own handler of SIGSEGV */

static Sigaction real_sigaction(void) {
    static Sigaction found;
    if (!found) found = (Sigaction)dlsym(RTLD_NEXT, "sigaction");
    return found;
}

static void answer(greg_t *registers) {
    unsigned values[4], leaf = registers[REG_RAX], subleaf = registers[REG_RCX];
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, subleaf, values[0], values[1], values[2], values[3]);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    /* Leaf 1 ignores ecx, so it matches whatever is there. */
    for (struct Rule *rule = rules; rule < rules + count; rule++)
        if (rule->leaf == leaf && (rule->subleaf == subleaf || leaf == 1))
            values[rule->place] &= ~rule->mask;
    registers[REG_RAX] = values[0];
    registers[REG_RBX] = values[1];
    registers[REG_RCX] = values[2];
    registers[REG_RDX] = values[3];
    registers[REG_RIP] += 2;
}

static void handle(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    /* The kernel sends a faulting `cpuid` without an address; so the code can be read. */
    if (info->si_code == SI_KERNEL && code[0] == 0x0f && code[1] == 0xa2) {
        answer(registers);
    } else if (theirs.sa_flags & SA_SIGINFO) {
        theirs.sa_sigaction(number, info, context);
    } else if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) {
        theirs.sa_handler(number);
    } else {
        /* The instruction faults again, and now ends the process. */
        struct sigaction standard = {.sa_handler = SIG_DFL};
        real_sigaction()(SIGSEGV, &standard, NULL);
    }
}

/* Python's faulthandler and others set a handler of their own: it is kept, and called for the rest. */
int sigaction(int number, const struct sigaction *wanted, struct sigaction *before) {
    if (number != SIGSEGV) return real_sigaction()(number, wanted, before);
    struct sigaction old = theirs;
    if (wanted) theirs = *wanted;
    if (before) *before = old;
    return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
    struct sigaction wanted = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
    return sigaction(number, &wanted, &before) ? SIG_ERR : before.sa_handler;
}

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("HIDE_CPUID");
    int length;
    for (; text && *text && count < RULES; count++) {
        struct Rule *rule = rules + count;
        if (sscanf(text, "%x:%x:%x:%x%n", &rule->leaf, &rule->subleaf, &rule->place, &rule->mask,
                   &length) != 4) break;
        text += length + (text[length] == ',');
    }
    /* A thread with a stack of its own for signals may have little left on the other. */
    struct sigaction ours = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    if (count && !real_sigaction()(SIGSEGV, &ours, NULL))
        syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
}
