/*
 * Preloaded into the guest kernel by scripts/vm, so that it runs on CPUs with AMX.
 *
 * User Mode Linux 6.1 keeps a program's extended registers in 2696 bytes, which hold all up to
 * AVX-512. A host kernel accepts PTRACE_SETREGSET of NT_X86_XSTATE only whole: with AMX 11008
 * bytes, so the guest's init dies with EFAULT. Here a short state is laid over the program's own
 * before it is set. What lies beyond is AMX tile data, which no program has without asking the
 * host kernel for it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

typedef long (*ptrace_call)(enum __ptrace_request, pid_t, void *, void *);

static ptrace_call libc_ptrace;

/* Static: the guest kernel calls from stacks of 16 KiB, and from one thread. */
static char whole[32768] __attribute__((aligned(64)));

__attribute__((constructor)) static void find_ptrace(void) {
    libc_ptrace = (ptrace_call)dlsym(RTLD_NEXT, "ptrace");
}

long ptrace(enum __ptrace_request request, ...) {
    va_list words;
    va_start(words, request);
    pid_t pid = va_arg(words, pid_t);
    void *address = va_arg(words, void *);
    void *data = va_arg(words, void *);
    va_end(words);

    struct iovec all = {.iov_base = whole, .iov_len = sizeof(whole)};
    if (request == PTRACE_SETREGSET && (long)address == NT_X86_XSTATE &&
        libc_ptrace(PTRACE_GETREGSET, pid, address, &all) == 0) {
        const struct iovec *given = data;
        if (given->iov_len < all.iov_len) {
            memcpy(whole, given->iov_base, given->iov_len);
            data = &all;
        }
    }
    return libc_ptrace(request, pid, address, data);
}
