//! Calls that are not made to fail, each with the reason.

use nix::libc::{self, c_long};

/// Calls that reach no file, so that no fault of theirs is one of storage.
pub(in super::super) const LEFT_OUT: &[(&str, c_long, &str)] = &[
    (
        "mmap",
        libc::SYS_mmap,
        "memory: where it ends, Rust ends the process",
    ),
    (
        "munmap",
        libc::SYS_munmap,
        "fails only for part of a mapping",
    ),
    ("mremap", libc::SYS_mremap, "memory"),
    ("mprotect", libc::SYS_mprotect, "memory"),
    ("madvise", libc::SYS_madvise, "advice"),
    ("fadvise64", libc::SYS_fadvise64, "advice"),
    ("brk", libc::SYS_brk, "memory"),
    ("futex", libc::SYS_futex, "threads wait"),
    ("sched_yield", libc::SYS_sched_yield, "threads wait"),
    ("clock_nanosleep", libc::SYS_clock_nanosleep, "threads wait"),
    ("fcntl", libc::SYS_fcntl, "a descriptor's flags"),
    (
        "setfsuid",
        libc::SYS_setfsuid,
        "asks whose files are created",
    ),
    ("restart_syscall", libc::SYS_restart_syscall, "threads wait"),
    ("rseq", libc::SYS_rseq, "a thread starts"),
    (
        "set_robust_list",
        libc::SYS_set_robust_list,
        "a thread starts",
    ),
    ("sigaltstack", libc::SYS_sigaltstack, "a thread starts"),
    (
        "rt_sigprocmask",
        libc::SYS_rt_sigprocmask,
        "a thread starts",
    ),
    ("prctl", libc::SYS_prctl, "a thread starts: its name"),
    ("exit", libc::SYS_exit, "a thread ends"),
    ("gettid", libc::SYS_gettid, "about the process itself"),
    ("getpid", libc::SYS_getpid, "about the process itself"),
    ("geteuid", libc::SYS_geteuid, "about the process itself"),
    ("getegid", libc::SYS_getegid, "about the process itself"),
    (
        "rt_sigaction",
        libc::SYS_rt_sigaction,
        "a signal is handled",
    ),
    (
        "rt_sigreturn",
        libc::SYS_rt_sigreturn,
        "a signal was handled",
    ),
    ("prlimit64", libc::SYS_prlimit64, "about the process itself"),
    (
        "sched_getaffinity",
        libc::SYS_sched_getaffinity,
        "about the process itself",
    ),
    ("tgkill", libc::SYS_tgkill, "marks of this program"),
    ("kill", libc::SYS_kill, "marks of this program"),
    ("exit_group", libc::SYS_exit_group, "the process ends"),
];
