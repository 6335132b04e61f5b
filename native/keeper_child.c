/* A: from the keeper's world to the container's first process. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/keyctl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "keeper_child.h"

int sys_clone3(uint64_t flags, int cgroup_fd, uint64_t exit_signal) {
    struct clone_args args = {.flags = flags, .exit_signal = exit_signal};
    if (cgroup_fd >= 0) {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)cgroup_fd;
    }
    return (int)syscall(SYS_clone3, &args, sizeof args);
}

_Noreturn void child_fail(const struct child *c, int error) {
    struct notice notice = {NOTICE_FAILED, c->index, error};
    ssize_t ignored = write(c->fds->notice, &notice, sizeof notice);
    (void)ignored;
    _exit(125);
}

static void write_self(const struct child *c, const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        child_fail(c, errno);
    close(fd);
}

/* A hard limit can be raised only by the host's root, so A does it first of all; B sets both as
 * asked, last of all, because a small one would be in the way of what comes before. */
static int raise_limit(const struct record *r) {
    struct rlimit now;
    if (r->op != OP_RLIMIT)
        return 0;
    if (getrlimit((int)r->n[0], &now))
        return -1;
    if (now.rlim_max >= r->n[2])
        return 0;
    now.rlim_max = r->n[2];
    return setrlimit((int)r->n[0], &now);
}

/* New ids make a process what fs.suid_dumpable says; a host may have set it to 1, "debug". */
int stay_unreadable(void) {
    return prctl(PR_SET_DUMPABLE, 0);
}

static int become_id_0(void) {
    if (setgroups(0, NULL) || setresgid(0, 0, 0) || setresuid(0, 0, 0))
        return -1;
    return stay_unreadable();
}

/* Ids first: what B mounts and makes belongs to the task's own root from the start. */
static int become_root_of(int userns) {
    if (setns(userns, CLONE_NEWUSER))
        return -1;
    return become_id_0();
}

#define JOINED                                                                                     \
    (CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS |     \
     CLONE_NEWCGROUP)

static int join(int pidfd) {
    return setns(pidfd, JOINED) ? -1 : become_id_0();
}

static void enter(struct child *c, const struct record *r) {
    char text[16];
    int failed = 0;
    switch (r->op) {
    case OP_TASKS:
        failed = write((int)r->n[0], "0", 1) != 1;
        break;
    case OP_OOM_SCORE:
        snprintf(text, sizeof text, "%u", (unsigned)r->n[0]);
        write_self(c, "/proc/self/oom_score_adj", text);
        break;
    case OP_USERNS:
        failed = become_root_of((int)r->n[0]);
        break;
    case OP_NETNS:
        failed = setns((int)r->n[0], CLONE_NEWNET);
        break;
    case OP_PIDNS:
        failed = setns((int)r->n[0], CLONE_NEWPID);
        break;
    case OP_JOIN:
        failed = join((int)r->n[0]);
        break;
    default:
        break;
    }
    if (failed)
        child_fail(c, errno);
}

static uint64_t namespaces_of_b(const struct program *program) {
    if (program_find(program, OP_JOIN))
        return 0;
    uint64_t flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP;
    return program_find(program, OP_PIDNS) ? flags : flags | CLONE_NEWPID;
}

static void wire_streams(struct child *c) {
    if (dup2(c->fds->in, 0) < 0 || dup2(c->fds->out, 1) < 0 || dup2(c->fds->err, 2) < 0)
        child_fail(c, errno);
}

void default_signals(void) {
    static const uint64_t standard[4]; /* the kernel's struct sigaction: SIG_DFL, no flags */
    for (int s = 1; s < 65; s++)
        syscall(SYS_rt_sigaction, s, standard, NULL, 8);
}

/* Nothing of the agent's or the keeper's ways is left. */
static void become_ordinary(void) {
    const struct sched_param priority = {0};
    signal(SIGPIPE, SIG_DFL); /* all that the keeper ignores */
    signal(SIGXFSZ, SIG_DFL);
    umask(022);
    syscall(SYS_sched_setscheduler, 0, SCHED_OTHER, &priority); /* musl has only a stub */
    setpriority(PRIO_PROCESS, 0, 0);
    setsid();
}

_Noreturn void child_run(const struct program *program, const struct child_fds *fds) {
    struct child c = {.program = program, .fds = fds, .root = -1, .null = -1};
    sigset_t none;
    become_ordinary();
    for (c.index = 0; c.index < program->count; c.index++)
        if (raise_limit(&program->record[c.index]))
            child_fail(&c, errno);
    for (c.index = 0; c.index < program->count; c.index++)
        enter(&c, &program->record[c.index]);
    /* The records that need the agent's descriptors in A are done; those of B are mounts. */
    int pid = sys_clone3(CLONE_PARENT | namespaces_of_b(program), -1, 0);
    if (pid < 0)
        child_fail(&c, errno);
    if (pid) {
        struct notice notice = {NOTICE_PID, 0, pid};
        _exit(write(fds->notice, &notice, sizeof notice) < 0);
    }
    setsid();
    syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING,
            NULL); /* never the agent's; keyctl is filtered */
    if (program_find(program, OP_JOIN))
        c.root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    wire_streams(&c);
    for (c.index = 0; c.index < program->count; c.index++)
        container_step(&c, &program->record[c.index]);
    _exit(125); /* not reached: EXEC is the last record and does not return */
}
