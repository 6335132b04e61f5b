/* pid 1 of a container that asked for an init: starts the program as its only child, passes signals
 * on, reaps whatever is orphaned to it, and ends as the program ended. It was exec'd by B inside
 * the container, with the container's user, capabilities and filter; descriptor 3 is the notice
 * pipe. */
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

_Noreturn void init_run(char **argv, char **envp) {
    sigset_t all, before;
    prctl(PR_SET_NAME, "sandbox-init");
    fcntl(3, F_SETFD, FD_CLOEXEC);
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    sigemptyset(&before);
    pid_t child = fork();
    if (child < 0)
        _exit(125);
    if (!child)
        start(argv, envp, &before);
    close(3);
    for (;;) {
        siginfo_t info;
        if (sigwaitinfo(&all, &info) < 0)
            continue;
        if (info.si_signo != SIGCHLD) {
            kill(child, info.si_signo);
            continue;
        }
        int status;
        for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
            if (pid == child)
                _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    }
}
