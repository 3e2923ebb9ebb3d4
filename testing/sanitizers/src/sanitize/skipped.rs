//! Tests that a sanitizer can't follow, or that show it nothing, by name.

use super::sanitizer::Sanitizer;

/// What is run with neither.
pub(super) const LEFT_OUT: [(&str, &str); 6] = [
    (
        "most of atomic-file's tests",
        "they test the results of system calls and other processes, which a sanitizer does not check; the unit tests and those of groups, recycling and replacing are run",
    ),
    (
        "page-reader's tests of populated pages, and process-memory",
        "a sanitizer adds memory and threads, which these tests examine",
    ),
    (
        "the conformance suite of write-tracking",
        "it tests when threads and virtual machines have page faults, and a sanitizer causes many more",
    ),
    (
        "kvm-backend",
        "its code runs a virtual machine, whose memory accesses a sanitizer does not see",
    ),
    (
        "uffd",
        "it tests when threads have page faults, and a sanitizer causes many more",
    ),
    ("ramsnap", "it is a program, and tested from outside"),
];

pub(super) struct Skipped {
    /// By this one; by none where there is none.
    pub sanitizer: Option<Sanitizer>,
    /// The crate.
    pub of: &'static str,
    /// What its name contains.
    pub test: &'static str,
    pub why: &'static str,
}

/// The same code on each.
const KERNELS: &str =
    "what a file system does is the kernel's, and not watched: tmpfs has the same threads";

pub(super) const SKIPPED: &[Skipped] = &[
    Skipped {
        sanitizer: Some(Sanitizer::Thread),
        of: "sparse-file",
        test: "written_bytes_match_a_naive_writer",
        why: "the naive writer goes byte by byte, for minutes, on one thread; the others write by every engine, too",
    },
    Skipped {
        sanitizer: None,
        of: "guest-ram",
        test: "pages_are_marked_after_their_bytes_are_written",
        why: "it counts write faults, of which a sanitizer has more",
    },
    Skipped {
        sanitizer: None,
        of: "guest-ram",
        test: "allocated_ram_is_unmapped_with_its_guest",
        why: "it maps half a petabyte, and a sanitizer has memory of its own for what is mapped",
    },
    Skipped {
        sanitizer: None,
        of: "memory-image",
        test: "saves_and_restores_leave_no_guest_bytes_in_buffers",
        why: "it looks through all memory of the process, of which a sanitizer has terabytes",
    },
    Skipped {
        sanitizer: None,
        of: "lazy-restore",
        test: "filling_leaves_no_guest_bytes_in_buffers",
        why: "it looks through all memory of the process, of which a sanitizer has terabytes",
    },
    Skipped {
        sanitizer: None,
        of: "sparse-file",
        test: "Fs__Ext4",
        why: KERNELS,
    },
    Skipped {
        sanitizer: None,
        of: "sparse-file",
        test: "Fs__Xfs",
        why: KERNELS,
    },
    Skipped {
        sanitizer: None,
        of: "sparse-file",
        test: "Fs__Btrfs",
        why: KERNELS,
    },
    Skipped {
        sanitizer: None,
        of: "sparse-file",
        test: "Fs__Exfat",
        why: KERNELS,
    },
];
