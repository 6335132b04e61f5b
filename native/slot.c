/* Makes user namespaces, each with a network namespace inside it, and hands them over.
 *
 *   slot ARGUMENT...        descriptor 3: a SOCK_SEQPACKET socket
 *
 * An ARGUMENT is the first host id of a range of 65536, for which one slot is made, or a sysctl as
 * net/core/somaxconn=128, which every slot's network namespace gets. Each slot is one packet:
 * struct report and, with SCM_RIGHTS, the user and the network namespace. The first failure is
 * reported as a packet without descriptors and ends the program with status 1.
 *
 * The network namespace must be unshared by a process in the user namespace: one owned by the
 * initial user namespace would refuse the task raw sockets, sysfs and port 80. Only a process
 * outside may write an id map of 65536. Hence two processes a slot: the child is cloned into the
 * user namespace, waits until the parent has mapped it, and does the rest. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shed_limits.h"

#define SOCKET 3

struct report {
    uint32_t first_id;
    int32_t error;
    char call[56]; /* what failed, with its subject */
};

static uint32_t first_id;

static void fail(const char *call, const char *subject) {
    struct report report = {.first_id = first_id, .error = errno};

    snprintf(report.call, sizeof(report.call), "%s %s", call, subject);
    send(SOCKET, &report, sizeof(report), MSG_NOSIGNAL);
    _exit(1);
}

static void write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);

    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
        fail("write", path);
    close(fd);
}

static void map_ids(pid_t child, const char *file) {
    char path[64], map[64];

    snprintf(path, sizeof(path), "/proc/%d/%s", child, file);
    snprintf(map, sizeof(map), "0 %u 65536\n", first_id);
    write_file(path, map);
}

static void set_lo_up(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);

    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        fail("SIOCSIFFLAGS", "lo");
}

static void set_sysctl(const char *argument) {
    const char *value = strchr(argument, '=');
    char path[256];

    snprintf(path, sizeof(path), "/proc/sys/%.*s", (int)(value - argument), argument);
    write_file(path, value + 1);
}

static void hand_over(void) {
    struct report report = {.first_id = first_id};
    int fds[2] = {open("/proc/self/ns/user", O_RDONLY), open("/proc/self/ns/net", O_RDONLY)};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(fds))];
    } control = {.header.cmsg_len = CMSG_LEN(sizeof(fds))};
    struct iovec data = {&report, sizeof(report)};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};

    if (fds[0] < 0 || fds[1] < 0)
        fail("open", "/proc/self/ns");
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    message.msg_control = &control;
    message.msg_controllen = sizeof(control);
    memcpy(CMSG_DATA(&control.header), fds, sizeof(fds));
    if (sendmsg(SOCKET, &message, MSG_NOSIGNAL) != sizeof(report))
        fail("sendmsg", "slot");
}

/* In the user namespace, which has no ids until the parent wrote to `mapped`. */
static void fill_slot(int mapped, char **sysctls) {
    char byte;

    if (read(mapped, &byte, 1) != 1)
        _exit(1); /* the parent failed, and said why */
    if (setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)
        fail("setresuid", "0");
    if (unshare(CLONE_NEWNET) < 0)
        fail("unshare", "CLONE_NEWNET");
    set_lo_up();
    for (; *sysctls; sysctls++)
        if (strchr(*sysctls, '='))
            set_sysctl(*sysctls);
    hand_over();
    _exit(0);
}

static void make_slot(char **sysctls) {
    int mapped[2], status;
    pid_t child;

    if (pipe(mapped) < 0)
        fail("pipe", "mapped");
    if ((child = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0)) < 0)
        fail("clone", "CLONE_NEWUSER");
    if (child == 0) {
        close(mapped[1]);
        fill_slot(mapped[0], sysctls);
    }
    close(mapped[0]);
    map_ids(child, "uid_map");
    map_ids(child, "gid_map");
    if (write(mapped[1], "", 1) != 1 || close(mapped[1]) < 0)
        fail("write", "mapped");
    if (waitpid(child, &status, 0) != child || status != 0)
        _exit(1); /* the child reported, or was killed: then the socket's end says so */
}

/* A user namespace bounds its users together by the soft limits that its maker had of these (Linux
 * 5.14, ucounts), whatever they set themselves: those of the agent shall not reach into tasks. */
static void shed_agents_limits(void) {
    static const int limits[] = {RLIMIT_MEMLOCK, RLIMIT_MSGQUEUE, RLIMIT_SIGPENDING};

    shed_limits(limits, sizeof(limits) / sizeof(*limits));
}

/* The agent, who starts us with all of them blocked, may ignore some. */
static void let_signals_be_signals(void) {
    sigset_t none;

    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_DFL);
    signal(SIGCHLD, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

int main(int argc, char **argv) {
    let_signals_be_signals();
    shed_agents_limits();
    for (int i = 1; i < argc; i++) {
        if (!strchr(argv[i], '=')) {
            first_id = (uint32_t)strtoul(argv[i], NULL, 10);
            make_slot(argv + 1);
        }
    }
    return 0;
}
