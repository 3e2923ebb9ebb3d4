//! The system calls that a scenario makes, and how each can fail: what its manual page says, and
//! what disks and NFS are known to add.

mod left_out;

use nix::errno::Errno::{self, *};
use nix::libc::{self, c_long};

pub(super) use left_out::LEFT_OUT;

/// Calls that fail alike.
#[derive(Debug)]
pub(super) struct Kind {
    pub name: &'static str,
    number: c_long,
    /// Which calls of that number.
    of: Of,
    /// The errors of a call that did nothing.
    pub errors: &'static [Errno],
    /// The errors of a call that was carried out and whose answer was lost. An NFS client repeats
    /// the request, and the server answers that a moved file does not exist, or that a created one
    /// exists already. On a soft mount the client gives up.
    pub lost: &'static [Errno],
    /// Whether the call may do a part of the request. Its third argument is the number of bytes.
    pub short: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    All,
    /// `openat` that may create the file.
    Creating,
    /// `mmap` of a file.
    File,
    /// `fcntl` that asks for a lease.
    Lease,
    /// `fcntl` that makes another descriptor.
    Duplicate,
    /// `renameat2` with flags.
    Flags,
    /// `ioctl` of a userfaultfd, or of the device that opens one.
    Userfaultfd,
    /// `ioctl` that scans the page table.
    PagemapScan,
}

/// Every file system may find its disk unreadable, and NFS the file or the server gone.
const LOOKING: &[Errno] = &[EIO, ESTALE];
/// What takes room.
const ROOM: &[Errno] = &[EIO, ENOSPC, EDQUOT, EINTR, ESTALE];

const fn kind(name: &'static str, number: c_long, errors: &'static [Errno]) -> Kind {
    Kind {
        name,
        number,
        of: Of::All,
        errors,
        lost: &[],
        short: false,
    }
}

/// Of calls with the same number the first that fits.
pub(super) static KINDS: &[Kind] = &[
    Kind {
        of: Of::Creating,
        // An NFS server has made it, and says so the second time.
        lost: &[EEXIST, EIO],
        ..kind(
            "creat",
            libc::SYS_openat,
            &[EIO, ENOSPC, EDQUOT, EINTR, ESTALE, EMFILE, ENFILE, EROFS],
        )
    },
    kind(
        "openat",
        libc::SYS_openat,
        &[EIO, EINTR, ESTALE, EMFILE, ENFILE, ENOMEM],
    ),
    // The descriptor is closed in any case, also if the call fails: NFS reports failed writes here.
    Kind {
        lost: &[EIO, EINTR, ENOSPC, EDQUOT],
        ..kind("close", libc::SYS_close, &[])
    },
    kind("fstat", libc::SYS_fstat, LOOKING),
    kind("newfstatat", libc::SYS_newfstatat, LOOKING),
    kind("statx", libc::SYS_statx, LOOKING),
    kind("fstatfs", libc::SYS_fstatfs, &[EIO, ESTALE, EINTR, ENOSYS]),
    kind("readlinkat", libc::SYS_readlinkat, LOOKING),
    kind("readlink", libc::SYS_readlink, LOOKING),
    kind("getdents64", libc::SYS_getdents64, LOOKING),
    kind("fgetxattr", libc::SYS_fgetxattr, &[EIO, ESTALE, EOPNOTSUPP]),
    kind(
        "flistxattr",
        libc::SYS_flistxattr,
        &[EIO, ESTALE, EOPNOTSUPP, ERANGE],
    ),
    kind("lseek", libc::SYS_lseek, &[EIO, ESTALE, EINVAL]),
    Kind {
        short: true,
        ..kind("read", libc::SYS_read, &[EIO, EINTR, EAGAIN, ESTALE])
    },
    Kind {
        short: true,
        ..kind("pread64", libc::SYS_pread64, &[EIO, EINTR, EAGAIN, ESTALE])
    },
    Kind {
        lost: &[EIO],
        short: true,
        ..kind(
            "write",
            libc::SYS_write,
            &[EIO, ENOSPC, EDQUOT, EINTR, EAGAIN, ESTALE, EFBIG],
        )
    },
    Kind {
        lost: &[EIO],
        short: true,
        ..kind(
            "pwrite64",
            libc::SYS_pwrite64,
            &[EIO, ENOSPC, EDQUOT, EINTR, EAGAIN, ESTALE, EFBIG],
        )
    },
    Kind {
        lost: &[EIO, EINTR],
        ..kind("fsync", libc::SYS_fsync, ROOM)
    },
    Kind {
        lost: &[EIO, EINTR],
        ..kind("fdatasync", libc::SYS_fdatasync, ROOM)
    },
    Kind {
        lost: &[EIO, EINTR],
        ..kind(
            "ftruncate",
            libc::SYS_ftruncate,
            &[EIO, ENOSPC, EDQUOT, EINTR, ESTALE, EFBIG],
        )
    },
    Kind {
        lost: &[EIO, EINTR],
        ..kind(
            "fallocate",
            libc::SYS_fallocate,
            &[EIO, ENOSPC, EDQUOT, EINTR, ESTALE, EFBIG, EOPNOTSUPP],
        )
    },
    kind("fchmod", libc::SYS_fchmod, &[EIO, ESTALE, EPERM, EROFS]),
    Kind {
        of: Of::Flags,
        lost: &[ENOENT, EEXIST, EIO, EINTR, ESTALE],
        // The last two: no such call, no such flag. Then there are other ways.
        ..kind(
            "renameat2",
            libc::SYS_renameat2,
            &[EIO, ENOSPC, EDQUOT, EINTR, ESTALE, EINVAL, ENOSYS],
        )
    },
    Kind {
        lost: &[ENOENT, EIO, EINTR, ESTALE],
        ..kind("renameat", libc::SYS_renameat, ROOM)
    },
    Kind {
        lost: &[ENOENT, EIO, EINTR, ESTALE],
        ..kind("rename", libc::SYS_rename, ROOM)
    },
    Kind {
        lost: &[EEXIST, EIO, EINTR, ESTALE],
        ..kind(
            "linkat",
            libc::SYS_linkat,
            &[EIO, ENOSPC, EDQUOT, EINTR, ESTALE, EMLINK, EPERM],
        )
    },
    Kind {
        lost: &[ENOENT, EIO, EINTR],
        ..kind(
            "unlinkat",
            libc::SYS_unlinkat,
            &[EIO, ENOSPC, EDQUOT, EINTR, ESTALE, EBUSY],
        )
    },
    Kind {
        lost: &[ENOENT, EIO, EINTR],
        ..kind(
            "unlink",
            libc::SYS_unlink,
            &[EIO, ENOSPC, EDQUOT, EINTR, ESTALE, EBUSY],
        )
    },
    // EWOULDBLOCK would say of another process what is not so.
    kind("flock", libc::SYS_flock, &[EIO, EINTR, ENOLCK, EOPNOTSUPP]),
    Kind {
        of: Of::Lease,
        // EAGAIN: another process has the file open.
        ..kind("lease", libc::SYS_fcntl, &[EAGAIN, EINTR, EINVAL, ENOMEM])
    },
    Kind {
        of: Of::Duplicate,
        ..kind("dup", libc::SYS_fcntl, &[EMFILE])
    },
    // EAGAIN: a mapping is changing. ENOENT: the process ends. ENOMEM: no memory for page tables.
    Kind {
        of: Of::Userfaultfd,
        ..kind("uffd", libc::SYS_ioctl, &[EAGAIN, EINVAL, ENOENT, ENOMEM])
    },
    Kind {
        of: Of::PagemapScan,
        ..kind("pagemap-scan", libc::SYS_ioctl, &[EINTR, EINVAL, ENOMEM])
    },
    kind(
        "userfaultfd",
        libc::SYS_userfaultfd,
        &[EPERM, ENOSYS, EMFILE, ENFILE, ENOMEM],
    ),
    kind("pipe2", libc::SYS_pipe2, &[EMFILE, ENFILE]),
    kind("eventfd2", libc::SYS_eventfd2, &[EMFILE, ENFILE, ENOMEM]),
    kind("socket", libc::SYS_socket, &[EMFILE, ENFILE, ENOMEM]),
    kind(
        "bind",
        libc::SYS_bind,
        &[EACCES, EADDRINUSE, ENOMEM, ENOSPC],
    ),
    kind("listen", libc::SYS_listen, &[EADDRINUSE, EOPNOTSUPP]),
    kind(
        "accept4",
        libc::SYS_accept4,
        &[ECONNABORTED, EINTR, EMFILE, ENFILE, ENOMEM],
    ),
    // ENOPROTOOPT: before Linux 6.5, which returns no descriptor of the process.
    kind(
        "getsockopt",
        libc::SYS_getsockopt,
        &[EMFILE, ENODATA, ENOPROTOOPT],
    ),
    // Its third argument is a set of flags.
    kind(
        "recvmsg",
        libc::SYS_recvmsg,
        &[EAGAIN, ECONNRESET, EINTR, ENOMEM],
    ),
    kind(
        "sendto",
        libc::SYS_sendto,
        &[EAGAIN, ECONNRESET, EINTR, EPIPE],
    ),
    kind("shutdown", libc::SYS_shutdown, &[ENOTCONN]),
    kind("pidfd_open", libc::SYS_pidfd_open, &[EMFILE, ENOMEM]),
    // ESRCH would say of another process what is not so.
    kind(
        "pidfd_send_signal",
        libc::SYS_pidfd_send_signal,
        &[EPERM, ENOSYS],
    ),
    kind("poll", libc::SYS_poll, &[EINTR, ENOMEM]),
    kind(
        "ioctl",
        libc::SYS_ioctl,
        &[EIO, ENOSPC, EDQUOT, EINTR, ESTALE, EOPNOTSUPP],
    ),
    // ENOSYS, of kernels before 3.17, makes the standard library keep a descriptor of /dev/urandom.
    kind("getrandom", libc::SYS_getrandom, &[EINTR, EAGAIN]),
    Kind {
        of: Of::File,
        ..kind("mmap", libc::SYS_mmap, &[ENOMEM, EAGAIN, ENODEV])
    },
    // A container's filter, a limit, a kernel without it.
    kind(
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        &[ENOSYS, EPERM, ENOMEM, EMFILE],
    ),
    kind(
        "io_uring_enter",
        libc::SYS_io_uring_enter,
        &[EINTR, EAGAIN, EBUSY],
    ),
    // No call, but it fails like one: a write that was handed to the kernel by io_uring.
    Kind {
        lost: &[EIO],
        short: true,
        ..kind(
            "completion",
            -1,
            &[
                EIO, ENOSPC, EDQUOT, EINTR, EAGAIN, ESTALE, EFBIG, ECANCELED, EINVAL, EOPNOTSUPP,
            ],
        )
    },
    kind("clone3", libc::SYS_clone3, &[EAGAIN, ENOMEM]),
];

/// What a call is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Class {
    Fails(&'static Kind),
    LeftOut,
    /// It is in no list.
    Unknown,
}

impl Class {
    pub(super) fn of(number: c_long, arguments: [u64; 6]) -> Self {
        let fits = |kind: &&Kind| kind.number == number && kind.of.fits(arguments);
        if let Some(kind) = KINDS.iter().find(fits) {
            return Self::Fails(kind);
        }
        match LEFT_OUT.iter().any(|(_, left_out, _)| *left_out == number) {
            true => Self::LeftOut,
            false => Self::Unknown,
        }
    }
}

/// Returns the kind of device that an `ioctl` is for.
fn ioctl_type(request: u64) -> u64 {
    (request >> 8) & 0xff
}

impl Of {
    fn fits(self, arguments: [u64; 6]) -> bool {
        match self {
            Self::All => true,
            Self::Creating => arguments[2] as libc::c_int & libc::O_CREAT != 0,
            Self::Lease => arguments[1] as libc::c_int == libc::F_SETLEASE,
            Self::Duplicate => arguments[1] as libc::c_int == libc::F_DUPFD_CLOEXEC,
            Self::File => arguments[4] as libc::c_int >= 0,
            Self::Flags => arguments[4] != 0,
            Self::Userfaultfd => ioctl_type(arguments[1]) == 0xaa,
            Self::PagemapScan => arguments[1] & 0xffff == 0x6610,
        }
    }
}

impl Kind {
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        KINDS.iter().find(|kind| kind.name == name)
    }

    pub(super) fn removes(&self) -> bool {
        [libc::SYS_unlink, libc::SYS_unlinkat].contains(&self.number)
    }

    /// A sync that fails may have lost what was written: success must not be reported then.
    pub(super) fn is_sync(&self) -> bool {
        [libc::SYS_fsync, libc::SYS_fdatasync].contains(&self.number)
    }
}

/// Of all that are in the table.
pub(super) fn errno(name: &str) -> Option<Errno> {
    let all = KINDS
        .iter()
        .flat_map(|kind| kind.errors.iter().chain(kind.lost));
    all.copied().find(|errno| format!("{errno:?}") == name)
}

#[cfg(test)]
mod tests;
