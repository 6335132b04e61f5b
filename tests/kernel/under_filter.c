/* under_filter FILTER PROGRAM [ARGUMENT]...   run a program under a system call filter
 * under_filter FILTER                         load it in 1001 processes, print the median in us
 *
 * As the keeper does it: without no_new_privs, which root may.
 */
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TIMES 1001

static long load(struct sock_fprog *program) {
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, program);
}

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int measure(struct sock_fprog *program) {
    double *took =
        mmap(NULL, TIMES * sizeof *took, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < TIMES; i++) {
        if (!fork()) {
            double began = now_us();
            long failed = load(program);
            took[i] = now_us() - began;
            _exit(failed ? 1 : 0);
        }
        int status;
        wait(&status);
        if (status)
            return 1;
    }
    qsort(took, TIMES, sizeof *took, ascending);
    printf("%.0f\n", took[TIMES / 2]);
    return 0;
}

int main(int argc, char **argv) {
    static struct sock_filter code[BPF_MAXINSNS];
    int fd = argc > 1 ? open(argv[1], O_RDONLY | O_CLOEXEC) : -1;
    ssize_t size = fd < 0 ? -1 : read(fd, code, sizeof code);
    if (size <= 0)
        return 125;
    struct sock_fprog program = {(unsigned short)((size_t)size / sizeof *code), code};
    if (argc == 2)
        return measure(&program);
    if (load(&program)) {
        perror("seccomp");
        return 125;
    }
    execvp(argv[2], argv + 2);
    perror(argv[2]);
    return 127;
}
