"""Control groups: how much a task may use, what it has used, and how all of it is ended.

One face, `Cgroup`, over two kernels' worth of files. Version 2 is the design. A *hybrid* host still
binds controllers to version 1 hierarchies and mounts a version 2 tree beside them; there each of
cpu, memory and pids is used where the host has it, with the same limits, and the version 2
directory, which needs no controller for that, still gives what version 1 never had: `cgroup.kill`,
freezing, the `populated` event, CLONE_INTO_CGROUP, a device program, and cpu time.

    <place>/sandbox-<instance>/task-<id>/<container>        the same path in every hierarchy in use

`<place>` is what systemd delegated: the cgroup of the agent's own unit (the agent then moves into
its leaf `agent/`, because a version 2 cgroup with controllers for its children may hold no process
itself) or of the unit sandbox-tasks.service (whose one process moves into `holder/`), in that
order; otherwise the root of the hierarchy. A tree that stands in one of them already stays there.
Nothing outside `sandbox-<instance>` is ever listed, changed or removed, but for those leaves and
`cgroup.subtree_control` of the place, where a missing controller is added and left.

What is on the path of a launch, and what must stay off it:
- Membership is the child's own act: CLONE_INTO_CGROUP with `directory_fd`, then `0` written to each
  of `tasks_fds`. Moving a process from outside (`cgroup.procs`) waits for a grace period, 7-10 ms.
- Controllers are enabled once, above the tasks. A task's directory enables them for its containers
  while it is empty, which takes no lock since Linux 6.0.
- Everything is opened relative to kept descriptors of directories that were checked to lie on a
  cgroup mount. Counters are read again and again through kept descriptors (3 us against 10).

The device policy is attached once, to `sandbox-<instance>`; all below inherit it.

What version 1 cannot do as version 2 does: a child's cpu quota may not exceed its parent's
(EINVAL); `memory_low` is only the soft limit; no swap means that memory and swap together have the
limit of memory.

    hierarchies   where things are mounted, which of them to use (pure), branches opened in them
    files         the files, declared with cgroupspy's descriptors; the only door to that library
    members       the processes of a cgroup, which needs no controller
    group, tree   Cgroup and CgroupTree
    devices       the device policy as a program (pure)
"""

from sandbox.kernel.cgroups.group import Cgroup
from sandbox.kernel.cgroups.limits import CgroupStats, Limits
from sandbox.kernel.cgroups.members import Members
from sandbox.kernel.cgroups.tree import CgroupTree

__all__ = ["Cgroup", "CgroupStats", "CgroupTree", "Limits", "Members"]
