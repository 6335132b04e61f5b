/* A program of a task that waits for processes which come in from outside: execs, health checks.
 *
 *     lie_in_wait         reach into each as soon as it is seen, until SIGTERM; then say how it
 * went lie_in_wait stop    send SIGSTOP to each
 *
 * Between its arrival and its execve such a process is one of the keeper's, which its name tells:
 * whoever opens its memory, its descriptors, its root or its program then could leave the task. An
 * attempt counts if the name is still the keeper's afterwards. It counts as a breach if the program
 * is the keeper's, too: the kernel changes the name a moment later than the program, and the task
 * may well reach into a program of its own. What is said is JSON: how many were seen, and for each
 * kind of attempt how many were made and succeeded, and whether it succeeds on an ordinary process
 * of the task, without which the rest would prove nothing.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *const ATTEMPTS[] = {
    "mem",    "maps",   "environ",          "fd",        "root",           "cwd", "exe",
    "ns/mnt", "ptrace", "process_vm_readv", "map_files", "exe for writing"};
#define COUNT (sizeof ATTEMPTS / sizeof *ATTEMPTS)

static unsigned made[COUNT], breached[COUNT], seen;
static volatile sig_atomic_t done;

static void finish(int number) {
    done = number;
}

static int is_keeper(int pid) {
    char path[32], name[32] = "";
    snprintf(path, sizeof path, "/proc/%d/comm", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, name, sizeof name - 1);
    close(fd);
    return n > 0 && !strcmp(name, "sandbox-keeper\n");
}

static int reads(const char *path) {
    char byte;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, &byte, 1);
    close(fd);
    return n > 0;
}

static int opens(const char *path, int flags) {
    int fd = open(path, flags | O_CLOEXEC);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

static int lists(const char *path) {
    DIR *directory = opendir(path);
    int count = 0;
    while (directory && readdir(directory))
        count++;
    if (directory)
        closedir(directory);
    return count > 2;
}

static int seize(int pid) {
    if (ptrace(PTRACE_SEIZE, pid, NULL, NULL))
        return 0;
    ptrace(PTRACE_INTERRUPT, pid, NULL, NULL); /* only what has stopped can be let go */
    waitpid(pid, NULL, __WALL);
    ptrace(PTRACE_DETACH, pid, NULL, NULL);
    return 1;
}

static int read_memory(int pid) {
    char byte;
    struct iovec mine = {&byte, 1}, yours = {(void *)&done, 1};
    return process_vm_readv(pid, &mine, 1, &yours, 1, 0) == 1 || errno == EFAULT;
}

static int attempt(size_t which, int pid) {
    const char *what = ATTEMPTS[which];
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, what);
    if (!strcmp(what, "ptrace"))
        return seize(pid);
    if (!strcmp(what, "process_vm_readv"))
        return read_memory(pid);
    if (!strcmp(what, "fd") || !strcmp(what, "map_files"))
        return lists(path);
    if (!strcmp(what, "mem"))
        return opens(path, O_RDWR);
    if (!strcmp(what, "exe for writing")) {
        snprintf(path, sizeof path, "/proc/%d/exe", pid);
        return opens(path, O_WRONLY);
    }
    return !strcmp(what, "maps") || !strcmp(what, "environ") ? reads(path) : opens(path, O_RDONLY);
}

/* Whoever may do anything at all to a process may read this link. */
static int runs_keeper(int pid) {
    char path[32], program[4096] = "";
    snprintf(path, sizeof path, "/proc/%d/exe", pid);
    if (readlink(path, program, sizeof program - 1) < 0)
        return 0;
    char *name = strrchr(program, '/');
    return name && !strcmp(name, "/keeper");
}

static void reach_into(int pid) {
    seen++;
    for (size_t i = 0; is_keeper(pid); i = (i + 1) % COUNT) {
        int succeeded = attempt(i, pid);
        if (!is_keeper(pid))
            return;
        made[i]++;
        breached[i] += succeeded && runs_keeper(pid);
    }
}

static int able(size_t which) {
    pid_t pid = fork();
    if (!pid) {
        prctl(PR_SET_NAME, "sandbox-keeper");
        for (;;)
            pause();
    }
    while (!is_keeper(pid))
        ;
    int succeeded = attempt(which, pid);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    return succeeded;
}

/* SIGSTOP may come after the execve: then it is the task's own program that was stopped. */
static void stop_keeper(int pid) {
    char path[32], text[128] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    char *name = read(fd, text, sizeof text - 1) > 0 ? strrchr(text, ')') : NULL;
    close(fd);
    int is_stopped = name && name[1] && name[2] == 'T';
    if (is_stopped && !is_keeper(pid))
        kill(pid, SIGCONT);
    else if (!is_stopped && is_keeper(pid))
        seen += kill(pid, SIGSTOP) == 0;
}

/* The last pid that was given in this pid namespace. */
static int newest(int loadavg) {
    char text[128] = "";
    if (pread(loadavg, text, sizeof text - 1, 0) <= 0)
        abort();
    return atoi(strrchr(text, ' ') + 1);
}

static void report(void) {
    printf("{\"seen\": %u", seen);
    for (size_t i = 0; i < COUNT; i++)
        printf(", \"%s\": [%u, %u, %d]", ATTEMPTS[i], made[i], breached[i], able(i));
    printf("}\n");
}

int main(int argc, char **argv) {
    int stop = argc > 1 && !strcmp(argv[1], "stop");
    int loadavg = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    struct sigaction on_term = {.sa_handler = finish};
    sigaction(SIGTERM, &on_term, NULL);
    puts("waiting");
    fflush(stdout);
    while (!done) {
        int last = newest(loadavg); /* may be given and not yet to be found: look again */
        for (int pid = last > 8 ? last - 8 : 2; pid <= last; pid++) {
            if (stop)
                stop_keeper(pid);
            else if (is_keeper(pid))
                reach_into(pid);
        }
    }
    report();
    return 0;
}
