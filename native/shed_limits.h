/* Limits that the agent happens to have and that are not meant for what it starts. */
#ifndef SHED_LIMITS_H
#define SHED_LIMITS_H

#include <sys/resource.h>

/* Lifts each of these as far as this process may. */
static inline void shed_limits(const int *limits, unsigned count) {
    const struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY};
    for (unsigned i = 0; i < count; i++) {
        struct rlimit own;
        if (setrlimit(limits[i], &none) == 0 || getrlimit(limits[i], &own))
            continue;
        own.rlim_cur = own.rlim_max;
        setrlimit(limits[i], &own);
    }
}

#endif
