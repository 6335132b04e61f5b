/* K: the keeper itself. See keeper.h for the whole picture. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "keeper_streams.h"
#include "shed_limits.h"

extern char **environ;

static struct program program;
static void *program_bytes; /* what the records' strings point into, until the container runs */
static size_t program_size;
static int status_is_ours; /* the lock is held: nobody else writes into the status directory */

/* Field 22 of /proc/PID/stat: with it a pid names one process for ever. */
static uint64_t start_time_of(int pid) {
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (size <= 0)
        return 0;
    text[size] = 0;
    char *at = strrchr(text, ')'); /* the name may hold anything, so count from its end */
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    return at ? strtoull(at, NULL, 10) : 0;
}

/* Renamed into place, so that a reader finds all of it or nothing. The file then has `size` bytes:
 * of what was reserved for it the rest stays, or goes. */
static void write_status(const char *name, const char *aside, const char *text, size_t size) {
    int fd = openat(STATUS_FD, aside, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return;
    int whole =
        write(fd, text, strlen(text)) == (ssize_t)strlen(text) && ftruncate(fd, (off_t)size) == 0;
    close(fd);
    if (whole)
        renameat(STATUS_FD, aside, STATUS_FD, name);
}

#define EXIT_SIZE 96
#define EXIT_LOSSES 64 /* where they begin: the line before them is shorter */
#define PID_SIZE 512

/* A full disk must not swallow who runs, or the next agent takes a container for lost, nor how it
 * ended: the room for both is taken beforehand. */
static int reserve(const char *aside, size_t size) {
    char blank[PID_SIZE];
    memset(blank, ' ', size);
    int fd = openat(STATUS_FD, aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, blank, size) != (ssize_t)size)
        return -1;
    return close(fd);
}

static void write_pids(int init, uint64_t init_start, int terminal) {
    char text[PID_SIZE];
    int at =
        snprintf(text, sizeof text, "keeper %d %llu\ninit %d %llu\n", getpid(),
                 (unsigned long long)start_time_of(getpid()), init, (unsigned long long)init_start);
    if (terminal >= 0)
        at += snprintf(text + at, sizeof text - (size_t)at, "terminal %d\n", terminal);
    const struct record *user = program_find(&program, OP_USERNS);
    const struct record *net = program_find(&program, OP_NETNS);
    if (user)
        at += snprintf(text + at, sizeof text - (size_t)at, "userns %d\n", (int)user->n[0]);
    if (net)
        snprintf(text + at, sizeof text - (size_t)at, "netns %d\n", (int)net->n[0]);
    write_status("pid", "pid.new", text, strlen(text));
}

static void report(uint32_t kind, uint32_t record, int32_t value, uint64_t start_time) {
    struct report r = {kind, record, value, 0, start_time, now_ns()};
    if (kind != REPORT_STARTED && status_is_ours) {
        char text[96];
        snprintf(text, sizeof text, "%s %u %d %llu\n", kind == REPORT_ENDED ? "ended" : "failed",
                 record, value, (unsigned long long)r.at_ns);
        write_status("exit", "exit.new", text, EXIT_SIZE);
    }
    /* The agent may be gone; it finds the file. */
    if (write(REPORT_FD, &r, sizeof r) < 0)
        errno = 0;
}

/* Output is passed on after the end was told, so what a client refused of it is added later: into
 * the room that was reserved, by one line `lost STREAM ERRNO` a stream. */
static void add_losses(const struct streams *streams) {
    char text[EXIT_SIZE - EXIT_LOSSES + 1] = "";
    int size = 0;
    for (int i = 0; i < 2; i++)
        if (streams->out[i].lost)
            size += snprintf(text + size, sizeof text - (size_t)size, "lost %u %d\n",
                             streams->out[i].number, streams->out[i].lost);
    int fd = size ? openat(STATUS_FD, "exit", O_WRONLY | O_CLOEXEC) : -1;
    if (fd >= 0 && pwrite(fd, text, (size_t)size, EXIT_LOSSES) == size)
        close(fd);
}

static void sync_exit(void) {
    int fd = openat(STATUS_FD, "exit", O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && fdatasync(fd) == 0)
        close(fd);
    fsync(STATUS_FD);
}

/* The keeper itself cannot work: told like a failed record, with a number that no record has. */
static _Noreturn void give_up(const char *what) {
    int error = errno;
    fprintf(stderr, "keeper: %s: %s\n", what, strerror(error));
    report(REPORT_FAILED, NO_FD, error, 0);
    _exit(125);
}

#define SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW)

static void load_program(void) {
    struct stat st;
    int seals = fcntl(PROGRAM_FD, F_GET_SEALS); /* -1, with every bit, for what is no memfd */
    if (seals < 0 || (seals & SEALS) != SEALS)
        errno = EPERM, give_up("the program is not sealed");
    if (fstat(PROGRAM_FD, &st) || st.st_size > MAX_PROGRAM)
        give_up("program");
    program_size = (size_t)st.st_size;
    program_bytes = mmap(NULL, program_size, PROT_READ, MAP_PRIVATE, PROGRAM_FD, 0);
    if (program_bytes == MAP_FAILED)
        give_up("program");
    close(PROGRAM_FD);
    const char *wrong = program_read(&program, program_bytes, program_size);
    if (wrong)
        errno = EBADMSG, give_up(wrong);
}

static void hold_lock(void) {
    if (flock(STATUS_FD, LOCK_EX | LOCK_NB))
        give_up("lock");
    status_is_ours = 1;
}

/* Only a child of ours is believed: in a shared pid namespace the init's end of the pipe can be had
 * by another container of the task, and the agent sends signals to that pid. */
static int is_child(int pid) {
    siginfo_t info;
    return pid > 0 && waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
}

static int64_t monotonic_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int is_readable(int fd, int64_t until) {
    struct pollfd polled = {fd, POLLIN, 0};
    int64_t left = until - monotonic_ms();
    return left > 0 && poll(&polled, 1, (int)left) != 0;
}

/* Reads what A and B say until exec, or the end of both, closes the pipe; returns B's pid. B is a
 * process of the task, whose others may stop it: a start that takes too long is killed. */
static int hear(int fd, int a, struct notice *failed) {
    int64_t until = monotonic_ms() + START_TIMEOUT_MS;
    struct notice notice;
    int pid = 0;
    *failed = (struct notice){0};
    while (is_readable(fd, until)) {
        if (read(fd, &notice, sizeof notice) != sizeof notice)
            return pid;
        if (notice.kind == NOTICE_PID && !pid && is_child(notice.value))
            pid = notice.value;
        if (notice.kind == NOTICE_FAILED && !failed->value)
            *failed = notice;
    }
    *failed = (struct notice){NOTICE_FAILED, NO_FD, ETIMEDOUT};
    kill(a, SIGKILL);
    if (pid)
        kill(pid, SIGKILL);
    return pid;
}

static int receive_descriptor(int socket) {
    char byte, control[CMSG_SPACE(sizeof(int))];
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    int fd = -1;
    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) == 1 && CMSG_FIRSTHDR(&message))
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

static int start(struct streams *streams, int *init) {
    int notice[2], terminal[2] = {-1, -1};
    const struct record *cgroup = program_find(&program, OP_CGROUP);
    if (pipe2(notice, O_CLOEXEC))
        give_up("pipe");
    if (program_find(&program, OP_TERMINAL) &&
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, terminal))
        give_up("socketpair");
    struct child_fds fds = {.in = streams->child[0],
                            .out = streams->child[1],
                            .err = streams->child[2],
                            .notice = notice[1],
                            .terminal = terminal[1],
                            .self = open("/proc/self/exe", O_RDONLY | O_CLOEXEC)};
    int a = sys_clone3(0, cgroup ? (int)cgroup->n[0] : -1, SIGCHLD);
    if (a < 0) {
        report(REPORT_FAILED, 0, errno, 0);
        return 0;
    }
    if (a == 0)
        child_run(&program, &fds);
    close(notice[1]);
    struct notice failed;
    *init = hear(notice[0], a, &failed);
    close(notice[0]);
    waitpid(a, NULL, 0);
    if (failed.value || !*init) {
        if (*init)
            waitpid(*init, NULL, 0);
        report(REPORT_FAILED, failed.record, failed.value ? failed.value : EIO, 0);
        return 0;
    }
    if (terminal[0] >= 0)
        streams_terminal(streams, receive_descriptor(terminal[0]));
    close(fds.self);
    if (terminal[0] >= 0)
        close(terminal[0]), close(terminal[1]);
    return 1;
}

/* What only the start needed: a mount held here would outlive the container's own namespace. */
static void let_go(void) {
    for (uint32_t i = 0; i < program.count; i++)
        switch (program.record[i].op) {
        case OP_ROOT:
        case OP_BIND:
        case OP_CGROUP:
        case OP_TASKS:
        case OP_JOIN:
            close((int)program.record[i].n[0]);
        }
    munmap(program_bytes, program_size);
}

/* The agent could do it itself, but its event loop would wait for it. */
static void release(void) {
    for (uint32_t i = 0; i < program.count; i++)
        if (program.record[i].op == OP_RELEASE)
            close((int)program.record[i].n[0]);
}

/* 1 when the container's first process has been reaped now. */
static int reap(int init) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == init) {
            report(REPORT_ENDED, 0, status, 0);
            return 1;
        }
    return 0;
}

static void tend(struct streams *streams, int signals, int init) {
    int ended = 0;
    while (!ended || streams_open(streams)) {
        int told = streams_turn(streams, signals, ended);
        struct signalfd_siginfo info;
        while (told && read(signals, &info, sizeof info) == sizeof info) {
            if (info.ssi_signo == SIGTERM)
                streams_detach(streams);
            if (info.ssi_signo == SIGCHLD && !ended)
                ended = reap(init);
        }
    }
}

/* The agent's limits are not ours, who may outlive it by months: a file of 20 blocks, a second of
 * processor time. Where hard ones hold, a segment that grows no more counts what is lost. */
static void shed_agents_limits(void) {
    static const int limits[] = {RLIMIT_FSIZE, RLIMIT_CPU, RLIMIT_AS, RLIMIT_DATA};
    shed_limits(limits, sizeof limits / sizeof *limits);
    signal(SIGXFSZ, SIG_IGN);
}

static int keep(unsigned descriptors) {
    sigset_t handled;
    struct streams streams;
    int init = 0;
    prctl(PR_SET_DUMPABLE, 0); /* nobody in a namespace of the task may look into K, A or B */
    prctl(PR_SET_NAME, "sandbox-keeper");
    default_signals(); /* the agent may ignore some; they are blocked until now */
    signal(SIGPIPE, SIG_IGN);
    shed_agents_limits();
    sigemptyset(&handled);
    sigaddset(&handled, SIGCHLD);
    sigaddset(&handled, SIGTERM);
    sigprocmask(SIG_SETMASK, &handled, NULL);
    unsigned first_free = REPORT_FD + 1 + descriptors;
    syscall(SYS_close_range, first_free, ~0u, 0);
    syscall(SYS_close_range, 3, first_free - 1, 4 /* CLOSE_RANGE_CLOEXEC */);
    setsid();
    if (chdir("/"))
        give_up("chdir /");
    umask(077);
    hold_lock();
    load_program();
    if (reserve("exit.new", EXIT_SIZE) || reserve("pid.new", PID_SIZE))
        give_up("status");
    int signals = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0 || streams_make(&streams, &program))
        give_up("streams");
    if (!start(&streams, &init))
        return 1;
    uint64_t init_start = start_time_of(init);
    streams_started(&streams);
    let_go();
    write_pids(init, init_start, streams.terminal);
    report(REPORT_STARTED, 0, init, init_start);
    release();
    tend(&streams, signals, init);
    add_losses(&streams);
    log_end(&streams.log);
    if (program_find(&program, OP_SYNC)) {
        /* The agent was woken by the report; only now comes what waits for the disk. */
        log_sync(&streams.log);
        sync_exit();
    }
    return 0;
}

static int print_records(void) {
#define X(name, number, shape, stage) printf("%d %s %s\n", number, #name, *shape ? shape : "-");
    RECORDS(X)
#undef X
    return 0;
}

int main(int argc, char **argv) {
    if (argc >= 3 && !strcmp(argv[0], "sandbox-init"))
        init_run(argv, environ);
    if (argc == 2 && !strcmp(argv[1], "--records"))
        return print_records();
    if (argc == 2)
        return keep((unsigned)strtoul(argv[1], NULL, 10));
    fprintf(stderr, "keeper: started by sandbox's agent, not by hand\n");
    return 125;
}
