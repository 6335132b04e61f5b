/* What the system call filter answers, for each ABI that a process of the task can speak. */
#define _GNU_SOURCE
#include <asm/unistd.h>

#include "probe_calls.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define X32_SYSCALL_BIT 0x40000000L
#define I386_GETPID 20L
#define MORE_THAN_FAMILIES 46L /* AF_MAX of Linux 6.1 and later */
#define NO_TYPE 15L            /* the last that fits in SOCK_TYPE_MASK of linux/net.h */

const struct call native_calls[] = {CALLS(ENTRY){0}};

typedef long caller(long number, const long *argument);

static long call_native(long number, const long *a) {
    long result;
#if defined(__x86_64__)
    register long r10 __asm__("r10") = a[3];
    register long r8 __asm__("r8") = a[4];
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a[0];
    register long x1 __asm__("x1") = a[1];
    register long x2 __asm__("x2") = a[2];
    register long x3 __asm__("x3") = a[3];
    register long x4 __asm__("x4") = a[4];
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
    result = x0;
#endif
    return result;
}

#ifdef __x86_64__
static long call_x32(long number, const long *a) {
    return call_native(number | X32_SYSCALL_BIT, a);
}

static long call_i386(long number, const long *a) {
    long result;
    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(number), "b"(a[0]), "c"(a[1]), "d"(a[2]), "S"(a[3]), "D"(a[4])
                     : "r8", "r9", "r10", "r11", "memory");
    return (int)result;
}
#endif

/* In a process of its own, because a call may work (personality) or kill (an ABI that the kernel
 * does not have); in a session of its own, because vhangup acts on the terminal. */
static int attempt(caller *call, long number, const long *argument) {
    int status;
    pid_t pid = fork();
    if (!pid) {
        setsid();
        _exit(outcome(call(number, argument)));
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        abort();
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/* Every family, with a type that there is not: EINVAL says that the call came through to the
 * kernel, which then loads no module for it. As it never makes a socket, no child is needed. */
static void report_families(caller *call, long number) {
    for (long family = 0; family < MORE_THAN_FAMILIES; family++) {
        char label[32];
        snprintf(label, sizeof label, "socket family %ld", family);
        json_number(label, outcome(call(number, (long[5]){family, NO_TYPE})));
    }
}

static void report(const char *abi, caller *call, const struct call *calls) {
    json_open(abi, '{');
    for (; calls->label; calls++) {
        if (!isdigit((unsigned char)calls->number[0]))
            continue;
        json_number(calls->label, attempt(call, atol(calls->number), calls->argument));
        if (!strcmp(calls->label, "socket unix"))
            report_families(call, atol(calls->number));
    }
    json_close('}');
}

#ifdef __x86_64__
/* A kernel built without the 32-bit ABI ends who tries it by a signal, and User Mode Linux takes
 * the number for one of the native ABI: there is no such door then. */
static int has_i386(void) {
    static const long none[5];
    int status;
    pid_t pid = fork();
    if (!pid)
        _exit(call_i386(I386_GETPID, none) != getpid());
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}
#endif

void report_system_calls(void) {
    json_open("system_calls", '{');
    report("native", call_native, native_calls);
#ifdef __x86_64__
    report("x32", call_x32, native_calls);
    if (has_i386())
        report("i386", call_i386, i386_calls);
#endif
    json_close('}');
}
