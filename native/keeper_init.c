/* pid 1 of a container that asked for an init: starts the program as its only child, passes signals
 * on, reaps whatever is orphaned to it, and ends as the program ended. It was exec'd by B inside
 * the container, with the container's user, capabilities and filter; descriptor 3 is the notice
 * pipe.
 *
 * Without a program it is pid 1 of a pid namespace that several containers share: it reaps, and
 * ends at a SIGTERM from outside of that namespace. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static void start(char **argv, char **envp, const sigset_t *unblocked) {
    /* argv: "sandbox-init", search path, index of the EXEC record, then the program's own words */
    setsid();
    ioctl(0, TIOCSCTTY, 0); /* only a terminal can become one; otherwise ENOTTY, which is fine */
    sigprocmask(SIG_SETMASK, unblocked, NULL);
    struct notice notice = {NOTICE_FAILED, (uint32_t)strtoul(argv[2], NULL, 10), 0};
    notice.value = exec_search(argv[1], argv + 3, envp);
    if (write(3, &notice, sizeof notice) < 0)
        _exit(127);
    _exit(notice.value == ENOENT ? 127 : 126);
}

static void reap(pid_t program) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        if (pid == program)
            _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

static void hear(const siginfo_t *info, pid_t program) {
    if (info->si_signo == SIGCHLD)
        reap(program);
    else if (program)
        kill(program, info->si_signo);
    else if (info->si_signo == SIGTERM && !info->si_pid) /* a sender outside has no pid in here */
        _exit(0);
}

_Noreturn void init_run(char **argv, char **envp) {
    sigset_t all, none;
    siginfo_t info;
    pid_t program = 0;
    prctl(PR_SET_NAME, "sandbox-init");
    prctl(PR_SET_CHILD_SUBREAPER, 1); /* in a shared pid namespace another one is pid 1 */
    fcntl(3, F_SETFD, FD_CLOEXEC);
    sigfillset(&all);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &all, NULL);
    if (argv[3] && (program = fork()) < 0)
        _exit(125);
    if (argv[3] && !program)
        start(argv, envp, &none);
    close(3);
    for (;;)
        if (sigwaitinfo(&all, &info) > 0)
            hear(&info, program);
}
