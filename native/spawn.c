/* Starting a program without waiting for it.
 *
 * posix_spawn holds its caller until the new program has begun: vfork, half a millisecond in which
 * an event loop does nothing else. Here the child shares the caller's memory as there, but not its
 * turn: it runs on a stack of its own while the caller goes on. So it touches nothing but its stack
 * and `struct spawn`, and calls no library: `errno` is the caller's. */

#include <signal.h>

struct spawn {
    const char *path;
    char *const *argv;
    int *fds; /* become 3, 4, ... */
    int count;
    int error; /* told by the child: the errno of what failed */
};

#if defined(__x86_64__)
static long raw(long number, long a, long b, long c, long d) {
    register long r10 __asm__("r10") = d;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
}
#elif defined(__aarch64__)
static long raw(long number, long a, long b, long c, long d) {
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
    return x0;
}
#else
#error "how this machine calls its kernel is not written down here"
#endif

/* Out of the way first, all of them: one may stand where another shall be. */
static long spawn_descriptors(struct spawn *s) {
    const long above = 3 + s->count;
    long null = raw(SYS_openat, AT_FDCWD, (long)"/dev/null", O_RDWR | O_CLOEXEC, 0);
    long done = null < 0 ? null : (null = raw(SYS_fcntl, null, F_DUPFD_CLOEXEC, above, 0));
    for (int i = 0; done >= 0 && i < s->count; i++)
        done = s->fds[i] = (int)raw(SYS_fcntl, s->fds[i], F_DUPFD_CLOEXEC, above, 0);
    for (int i = 0; done >= 0 && i < above; i++)
        done = raw(SYS_dup3, i < 3 ? null : s->fds[i - 3], i, 0, 0);
    return done;
}

static int spawn_child(void *argument) {
    struct spawn *s = argument;
    char *const nothing[] = {NULL};
    long result = spawn_descriptors(s);
    if (result >= 0)
        result = raw(SYS_execve, (long)s->path, (long)s->argv, (long)nothing, 0);
    s->error = (int)-result;
    raw(SYS_exit_group, 127, 0, 0, 0);
    return 127;
}

/* The pid. `s` and all it points to, and the stack, must stay until the program has begun or the
 * child is gone. The program begins with every signal blocked, no environment, and /dev/null as its
 * standard streams. */
static int sys_spawn(struct spawn *s, char *stack, unsigned size) {
    const uint64_t all =
        ~(uint64_t)0; /* a handler of the caller's would run in its memory, twice */
    uint64_t before;
    int pid, error;

    syscall(SYS_rt_sigprocmask, SIG_BLOCK, &all, &before, 8);
    pid = clone(spawn_child, (void *)((uintptr_t)(stack + size) & ~(uintptr_t)15),
                CLONE_VM | SIGCHLD, s);
    error = errno;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, 8);
    return pid < 0 ? -error : pid;
}
