//! Replaces files atomically and durably, one file or a group at once.
//!
//! Replace a config file, completely or not at all:
//! ```
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("config.toml");
//! let config = "answer = 42\n";
//! atomic_file::write(&path, config)?;
//! assert_eq!(std::fs::read_to_string(&path)?, config);
//! # Ok::<(), std::io::Error>(())
//! ```
//! A program that overwrites a file in place can leave a mixture of old and new bytes if it is
//! killed, fails to write, or loses power. This crate writes a staged file beside the destination,
//! syncs it, renames it onto the destination, and syncs the directory. [`AtomicWriter`] takes the
//! bytes in parts:
//! ```
//! use std::io::Write;
//! use atomic_file::AtomicWriter;
//! # let dir = tempfile::tempdir()?;
//! # let dest = dir.path().join("vm.state");
//!
//! let mut writer = AtomicWriter::open(&dest)?;
//! writer.write_all(b"registers")?;
//! writer.commit()?;
//! # Ok::<(), std::io::Error>(())
//! ```
//! At every instant the destination is the complete old file or the complete new file. After
//! [`commit`](AtomicWriter::commit) returns `Ok`, it is the new file, also after a power loss. An
//! error states which of the two files the destination is, or that this is unknown. It also names
//! every staged file that it leaves in the directory. All errors convert to [`std::io::Error`] with
//! `?` and keep their kind.
//!
//! # Examples
//!
//! Write at offsets and from several threads, with non-default options:
//! ```
//! use atomic_file::{AtomicWriter, Durability};
//! # let dir = tempfile::tempdir()?;
//! # let dest = dir.path().join("vm.mem");
//!
//! let writer = AtomicWriter::options().mode(0o640).durability(Durability::Barrier).open(&dest)?;
//! writer.file().set_len(1 << 20)?;
//! std::thread::scope(|scope| {
//!     let halves = [0, 1 << 19].map(|at| scope.spawn({
//!         let writer = &writer;
//!         move || writer.write_all_at(&[7; 4096], at)
//!     }));
//!     halves.into_iter().try_for_each(|half| half.join().expect("no panic"))
//! })?;
//! writer.commit()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Handle the states that a failed commit can leave:
//! ```
//! use atomic_file::{AtomicWriter, CommitError};
//! # let dir = tempfile::tempdir()?;
//! # let dest = dir.path().join("vm.mem");
//!
//! match AtomicWriter::open(&dest)?.commit() {
//!     Ok(()) => println!("new, durable"),
//!     Err(CommitError::NotReplaced { .. }) => println!("still the old file; write again"),
//!     Err(CommitError::ReplacedDurabilityUnknown { .. }) => {
//!         println!("new, but a power loss may undo it");
//!     }
//!     Err(other) => return Err(other.into()),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`AtomicGroup`] replaces files that belong together. Call [`recover`] at start-up to complete
//! interrupted group commits and remove orphaned staged files. [`sweep`] only removes orphaned
//! staged files.
//!
//! # How it works, as system calls
//!
//! On Linux, `open`, two writes and `commit` make these calls:
//! ```text
//! openat(AT_FDCWD, "vm", O_DIRECTORY|O_CLOEXEC) = 3  all later calls are relative to it
//! newfstatat(3, "vm.mem", AT_SYMLINK_NOFOLLOW)  a file, or ENOENT; this crate follows links itself
//! statx(3, ""), statx(3, "vm.mem")        not immutable, not append-only, not a mount point
//! openat(3, "."), getdents64              no interrupted group commit, and
//!                                         no orphaned staged file of "vm.mem"
//! newfstatat(3, ".atomic-file-2670fefa.spare")  ENOENT: no recycled file
//! getrandom(…, 8)                        the ID in the name of the staged file
//! openat(3, ".atomic-file-2670fefa-ebd32fc78d6c5729.stage",
//!        O_RDWR|O_CREAT|O_EXCL|O_NOFOLLOW|O_CLOEXEC, 0600) = 4
//! flock(4, LOCK_EX|LOCK_NB)               marks the staged file as in use
//! newfstatat(3, ".atomic-file-2670fefa-….stage")  not swept before the lock was acquired
//! fgetxattr(4, "system.posix_acl_access") an inherited list, which is removed
//! openat(3, ".")                          detects a descriptor limit in advance
//! pwrite64(4, ...) ...
//! fsync(4)                                syncs the bytes; if a mode other than 0600 is requested:
//! fchmod(4, mode)                         sets it and the preserved attributes
//! fsync(4)                                syncs them
//! newfstatat(3, ".atomic-file-2670fefa-….stage")  is it still this writer's file?
//! openat(3, "."), getdents64              no pending group commit includes "vm.mem"
//! newfstatat(3, "vm.mem", AT_SYMLINK_NOFOLLOW)  not a device, FIFO or socket by now
//! renameat(3, ".atomic-file-2670fefa-….stage", 3, "vm.mem")
//! flock(4, LOCK_UN)                       a forked child may still have the descriptor
//! openat(3, "."), getdents64              no group was published just before the rename
//! fsync(3)                                syncs the new name
//! newfstatat(3, "", AT_EMPTY_PATH)        the file system was not shut down meanwhile (XFS)
//! ```
//! On macOS, a sync is `fcntl(F_FULLFSYNC)`, because `fsync` leaves the bytes in the drive's cache
//! there. If that call fails with `ENOTTY`, `ENOTSUP` or `EINVAL`, the file system does not support
//! it and `fsync` is used. Other errors cause no fallback.
//!
//! A call that a signal interrupts (`EINTR`) is repeated. A *failed* sync is never repeated: the
//! kernel may have dropped the pages that it could not write, and a second sync would then report
//! success. After any error of the rename, the destination is compared with the staged file
//! (device, inode, size), because a network file system may lose the reply to a rename that took
//! effect.
//!
//! ## Detecting orphaned staged files
//!
//! The name of a staged file has a fixed length for every destination, so destination names of up
//! to 255 bytes fit. It is ASCII and random, so that no other user can occupy it. The writer holds
//! a `flock` on its staged file. The kernel releases that lock when the process ends. A process
//! that finds a staged file tries to lock it: if it succeeds, the file is orphaned. This works
//! between threads, processes and NFS clients. The mode is 0600 until the commit has synced the
//! bytes, so that no other user can hold the lock. The commit then sets the final mode, and the
//! owner if it is preserved, and syncs the file again.
//!
//! `open` lists the directory and removes the orphaned staged files of its own destination that
//! belong to this user or to the destination's owner. [`sweep`] removes the orphaned staged files
//! of all destinations. `src/staged_file.rs` describes the protocol.
//!
//! On a file system without such locks (an NFS mount without its lock daemon), staged files have a
//! different name, and only their own writer removes them.
//!
//! ## What fails early
//!
//! [`AtomicWriterOptions::open`] fails if the commit is known to fail:
//! - The destination is a directory, a mount point, immutable, append-only, or swap space in use.
//! - A sticky directory protects the destination from this user.
//! - Files in the directory cannot be renamed.
//! - Attributes cannot be preserved.
//! - The staging directory is on another file system.
//! - `no_clobber` is requested and the file system does not support it.
//!
//! ## Recycling
//!
//! With [`AtomicWriterOptions::recycle`], `open` reuses the file that the previous commit replaced,
//! if it exists and no other process has it open. The commit keeps the file that it replaces:
//! ```text
//! openat(3, ".atomic-file-2670fefa.spare", O_RDWR|O_NOFOLLOW|O_CLOEXEC) = 4
//! flock(4, LOCK_EX|LOCK_NB)               excludes other writers; then the name is checked
//! fstat(4), fstatfs(4), flistxattr(4)     one link, own user, no attributes, leases work
//! openat(3, "."), getdents64              no group of any user is in progress: see below
//! fchmod(4, 0600)                         no other user can open it from here on
//! fcntl(4, F_SETLEASE, F_WRLCK), F_UNLCK  no process has it open or mapped
//! renameat2(3, ".atomic-file-2670fefa.spare", 3, ".atomic-file-2670fefa-….stage",
//!           RENAME_NOREPLACE)
//! pwrite64(4, ...) ...
//! fsync(4)
//! openat(3, "vm.mem", O_RDONLY|O_NOFOLLOW|O_CLOEXEC) = 5
//!                                         the old file: locked and checked like the first
//! renameat2(3, ".atomic-file-2670fefa-….stage", 3, "vm.mem", RENAME_EXCHANGE)
//! fsync(3)                                a crash cannot restore the old file any more
//! fchmod(5, 0600); fcntl(5, F_SETLEASE, F_WRLCK), F_UNLCK
//!                                         if another process has it open, it is removed
//! renameat2(3, ".atomic-file-2670fefa-….stage", 3, ".atomic-file-2670fefa.spare",
//!           RENAME_NOREPLACE)
//! ```
//! A file receives the recycled name only after the sync of the directory. Therefore any process
//! may overwrite a file of that name, also after a crash. Before that, the old file has the name of
//! a staged file and counts as an orphaned one. `src/recycle.rs` describes the protocol.
//!
//! ## Groups
//!
//! [`AtomicGroup::commit`] takes these steps. `S` stands for a sync of the directory:
//!
//! 1. Sync every staged file. Wait while another group of this user with a common destination is in
//!    progress (`src/ticket.rs`). Write and sync the group record: the names, inode numbers and
//!    sizes of the staged files, the names of the destinations and what they are now, and a CRC-32.
//!    `S`, so that a record that survives a crash never names a staged file that did not survive.
//! 2. Rename the record to `.atomic-file-ID.group`. `S`. **This is the commit point**: after an
//!    earlier crash all destinations are old, after a later crash all become new.
//! 3. Rename every staged file to its destination. `S`.
//! 4. Remove the record. `S`, so that a crash cannot restore it after later commits.
//!
//! The group's process holds the lock of the record until the last step. A record that can be
//! locked belongs to a process that died. The next writer to one of its files continues at step 3.
//! Until that step, a commit of one of the group's destinations waits.
//!
//! **A recovery never undoes a commit.** Before it renames anything, it checks every member:
//! - The destination is the recorded staged file: the member is complete.
//! - The destination is not the recorded old file, by inode number and generation: a later commit
//!   replaced it, and its file stays.
//! - Otherwise the staged file is renamed.
//!
//! The generation is the time of creation. On a file system without that time, it is a digest of
//! the file's handle. On a file system with neither, groups are [refused](Ineligible). A recycled
//! file keeps its generation, so it is not reused while a group of any user is in progress. A
//! commit of a single file looks for group records before its rename and again after it. Therefore
//! a recovery that checked the destination before the rename has ended when the commit returns.
//!
//! **A record affects only its own members.** A record cannot be completed if a staged file was
//! replaced by another file or a destination is now a directory. Writers to its members then fail
//! until a user resolves it; other writers do not. [`recover`] reports such a record, completes all
//! other groups, and sweeps. The same applies if a staged file was removed and its destination is
//! still the recorded one: the other files of the group stay as they are. If that holds for all
//! files of a group, all are old, and the record is dropped. A damaged record is reported and
//! ignored, and the staged files of its user are kept. A torn record, which a power loss leaves
//! with [`Durability::None`], did not reach its commit point and is removed.
//!
//! **A record is trusted only if it belongs to this user**, or to the directory's owner if no other
//! user may write there. Other records are ignored and never waited for. In a directory where other
//! users may write, a trusted record must also have a single link and be accessible to its owner
//! alone. A record can only cause renames within its directory, and only of files with the name of
//! a staged file.
//!
//! **A sweep keeps the staged files that a record names**, if they belong to the record's own user.
//! If the record is root's or is trusted, this applies to the files of all users: root's staged
//! files change their owner when the owner is preserved. A process that is not root and may change
//! owners can commit such files in a group only if its record is trusted by all users.
//!
//! Records of version 1, named `.atomic-file-group`, are still completed. They do not record the
//! old destination, so later commits cannot be distinguished from it.
//!
//! ## Replacing a file that was read
//!
//! By default, the last writer to commit wins. A writer whose bytes were derived from the
//! destination passes the [`FileVersion`] that it read to [`AtomicWriterOptions::replace_only`]. If
//! another writer committed since then, `open` or the commit fails and replaces nothing:
//! ```text
//! fsync(4)
//! openat(3, "."), getdents64              no pending group commit includes "vm.mem"
//! flock(5, LOCK_EX|LOCK_NB)               the file that was read: excludes other such writers
//! fcntl(5, F_SETLEASE, F_RDLCK)           no program can open it for writing
//! newfstatat(3, "vm.mem")                 is it that file, unchanged?
//! renameat(3, ".atomic-file-2670fefa-….stage", 3, "vm.mem")
//! fcntl(5, F_SETLEASE, F_UNLCK)
//! flock(5, LOCK_UN)
//! ```
//! If several such writers have read the same file, one of them replaces it (on file systems with
//! locks). No system call compares and renames in one step, and other writers do not take that
//! lock. The comparison and the rename are two consecutive system calls. If a writer *without*
//! `replace_only` commits between them, its file is replaced.
//!
//! # What may be on the medium after a crash
//!
//! The file system and the medium are assumed to behave as follows:
//! - Data that was synced successfully stays and reads back as it was written.
//! - A rename is atomic. After a crash, each of the two names refers to what it referred to before
//!   the rename or to what it referred to after it. A destination that existed before always
//!   exists.
//! - Nothing is assumed about the order of changes that were not synced. Each write, name and
//!   length may be lost, complete or torn.
//!
//! If a process is killed, the kernel keeps all completed calls in order.
//!
//! | crash after | [`Full`](Durability::Full): the destination is | left in the directory |
//! |---|---|---|
//! | `open`, writes | old | the staged file, possibly, with any contents |
//! | sync of the file | old | the staged file, possibly, complete |
//! | rename | old or new, complete | the staged file if old |
//! | sync of the directory: `commit` returns | **new** | nothing |
//!
//! With [`AtomicWriterOptions::recycle`], the rename is an exchange. The old file then has the name
//! of the staged file, and after the sync of the directory the recycled name. [`sweep`] and the
//! next writer handle both.
//!
//! With [`Barrier`](Durability::Barrier), the commit ends one row earlier. With
//! [`None`](Durability::None), neither sync takes place. After a power loss (but not after a kill)
//! the destination may then be empty or torn.
//!
//! | crash in a group's | the destinations are | after recovery |
//! |---|---|---|
//! | step 1 | old | old; staged files swept |
//! | step 2 | old | old, or new if the record is on the medium |
//! | step 3, 4 | each old or new, complete | **new** |
//! | after `commit` returned | **new** | |
//!
//! # Limitations
//!
//! - A commit replaces the *name*. Other hard links to the old file keep it, and a process that has
//!   it open continues to read it. The new file has the requested mode and the owner of a newly
//!   created file, unless [`AtomicWriterOptions::preserve`] is set.
//! - A `fork`ed child that does not `exec` keeps the locks if its parent is killed, and runs
//!   destructors if it unwinds. Let it call `_exit`.
//! - Locks are advisory. Another user who may write to the directory can remove or exchange a
//!   staged file. The commit detects that its staged file was replaced, except in the instant of
//!   the rename.
//! - Any process that may read a destination can hold a `flock` on it. This makes commits with
//!   [`AtomicWriterOptions::replace_only`] fail, and the file is not recycled. It affects nothing
//!   else.
//! - The path of a destination may be longer than `PATH_MAX`: this crate opens its directory in
//!   steps. System calls do not accept the longer paths that it returns, such as
//!   [`AtomicWriter::staged_path`]. A file name longer than the file system's limit (mostly 255
//!   bytes) is an error.
//! - A directory without read permission cannot be synced, so it cannot be used.
//! - Groups need locks, and inode numbers that are stable across mounts. FAT, exFAT and FUSE file
//!   systems are [refused](Ineligible). A file system that cannot sync a directory fails every
//!   commit with [`Full`](Durability::Full); choose a weaker durability there.
//! - A lease does not detect these users of the old file, which may see new bytes in it: a process
//!   inside `open(2)` that has looked up the destination's name and opens the file only after a
//!   recycling commit and the next `open`; an NFS client that this machine serves; `sendfile` and
//!   `splice` in progress; a bind mount of the file itself (a container's file mount); a descriptor
//!   opened with `O_PATH`, once it is opened again through `/proc`. The kernel does not report bind
//!   mounts in other mount namespaces. Mount the directory instead of a recycled file.
//! - In a user namespace of Linux, all users and groups that the namespace does not map have one
//!   id, the overflow id (65534). This crate treats [two users with that id](is_same_user) as
//!   different users, even if the namespace maps it. In shared directories, its links are not
//!   followed, and its files are not a source of attributes. No file is given to that id, and its
//!   files in sticky directories are not replaced. A process whose own user is not mapped is
//!   treated the same way: its files are not recycled, and it cannot commit groups. The overflow id
//!   is read once per process.
//! - Where all ids are mapped, the files on an ID-mapped mount whose owners the mount does not map
//!   also have the overflow id. They are treated as files of one user.
//! - In a directory that ignores case, names of one file that differ in case (or in Unicode
//!   composition) count as different destinations for waiting and serialization. A group does not
//!   recognize two new names that differ in Unicode composition only: see [`AtomicGroup`].
//! - Readers see the files of a group change one by one.
//! - Writers and groups of different users with common destinations do not wait for each other. The
//!   files of such groups may mix, and a group may replace a file that another user commits during
//!   it.
//! - `open` lists the directory once, and `commit` lists it twice. Avoid directories of hundreds of
//!   thousands of files.
//! - If a process of this user is stopped (`SIGSTOP`) during a group commit, commits of that
//!   group's files wait until it is continued or killed.
//!
//! # Cargo features
//!
//! - `tracing` (off by default): emits events of the crate [`tracing`](https://docs.rs/tracing), or
//!   records of the crate [`log`](https://docs.rs/log) if the program has no subscriber of
//!   `tracing`. They state which files a sweep removed and kept, and why a file was not recycled.
//!   They contain paths, and no bytes of files.
//!
//! This crate supports Linux and macOS, and compiles on other Unix systems.

mod acl;
mod attribute;
#[cfg(test)]
mod auto_traits;
mod destination;
mod directory;
mod durability;
mod error;
mod group;
mod ids;
mod locked_file;
mod names;
mod options;
mod orphan;
mod permissions;
mod preflight;
mod preserve;
mod record;
mod records;
mod recover;
mod recycle;
mod rename;
mod report;
mod retry;
mod staged_file;
mod stat;
mod sweep;
mod sys;
mod ticket;
mod trace;
mod version;
mod write;
mod writer;

pub use attribute::{Attribute, NotPreserved};
pub use destination::{Symlinks, check_destination};
pub use durability::Durability;
pub use error::{
    CommitError, CommitStep, GroupCommitError, Leftover, Obstacle, OpenError, RecoverError,
    SweepError,
};
pub use group::{AddError, AtomicGroup, Ineligible};
pub use ids::is_same_user;
pub use options::AtomicWriterOptions;
pub use permissions::others_may_write;
pub use preserve::Preserve;
pub use recover::recover;
pub use report::{RecoverReport, Skipped, SweepReport};
pub use sweep::{preview_sweep, sweep};
pub use version::FileVersion;
pub use write::write;
pub use writer::AtomicWriter;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
